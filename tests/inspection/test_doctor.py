"""`shortstack doctor`: what is here, what is missing and how it is got, and no secret."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from shortstack.inspection import doctor as room
from shortstack.inspection.doctor import DoctorResult, doctor

TOKEN = "hf_" + "Secret0Secret1Secret2" * 2


def says(result: DoctorResult, section: str, what: str) -> tuple[str, str]:
    """(status, text) of one line."""
    return next((one.status, one.says) for one in result.sections[section] if one.what == what)


def test_versions_devices_and_caches_are_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, kept = tmp_path / "hub", tmp_path / "kept"
    (hub / "blobs").mkdir(parents=True)
    (hub / "blobs/a").write_bytes(b"x" * 3000)
    (hub / "link").symlink_to(hub / "blobs")  # counted once
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("SHORTSTACK_CACHE", str(kept))
    result = doctor()
    assert says(result, "versions", "torch") == ("ok", importlib.metadata.version("torch"))
    assert says(result, "versions", "python")[1] == sys.version.split()[0]
    assert "processors, memory: " in says(result, "devices", "cpu")[1]
    assert "float32 products by " in says(result, "devices", "cpu arithmetic")[1]
    assert f"{hub}: 3 kB in 1 files" in says(result, "caches", "hub")[1]
    assert says(result, "caches", "evaluations") == ("ok", f"{kept}: does not exist yet")
    assert says(result, "hub and environment", "hub")[1].endswith(", offline")  # as tests are
    shown = result.to_text()
    assert all(title in shown for title in result.sections)
    assert shown.endswith("all that shortstack needs is here")
    assert result.exit_code == 0
    assert json.loads(json.dumps(result.to_json()))["ok"] is True


def test_every_extra_is_complete_or_has_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "lm-eval" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = doctor()
    assert says(result, "extras", "retrain") == ("note", "without peft: pip install 'shortstack[retrain]'")
    assert says(result, "extras", "eval") == ("note", "without lm-eval: pip install 'shortstack[eval]'")  # too old
    assert {one.what for one in result.sections["extras"]} >= {
        "parquet",
        "retrain",
        "eval",
        "quantize",
        "demo",
        "report",
    }
    assert result.exit_code == 0  # nobody must have them


@pytest.mark.parametrize(("found", "shown"), [("5.0.1", "5.0.1, needed: "), (None, "not installed, needed: ")])
def test_a_package_of_the_core_that_is_missing_or_too_old(
    monkeypatch: pytest.MonkeyPatch, found: str | None, shown: str
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "transformers" and found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found if name == "transformers" and found else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = doctor()
    failed = [one for one in result.sections["versions"] if one.status == "fail"]
    assert [one.what for one in failed] == ["transformers"]
    assert failed[0].says.startswith(shown)
    assert "pip install 'transformers" in failed[0].says
    assert result.exit_code == 1


def test_engines_are_looked_for_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "llama-bench"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = doctor()
    assert says(result, "engines", "llama.cpp") == ("ok", str(program))
    assert says(result, "engines", "vLLM")[0] == "note"


def test_a_driver_that_fails_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def broken() -> int:
        raise RuntimeError("the driver is too old\nmore")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    assert says(doctor(), "devices", "cuda") == ("note", "cannot be used: the driver is too old")


@pytest.mark.fault(84)
def test_of_a_token_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    result = doctor()
    assert says(result, "hub and environment", "token") == ("ok", "there is one")
    assert TOKEN not in result.to_text() + json.dumps(result.to_json())
    assert "HF_TOKEN" not in room._VARIABLES
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    assert says(doctor(), "hub and environment", "token")[0] == "note"
