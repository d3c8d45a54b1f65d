"""The process that quantizes may fail in any way: one line says how, and nobody waits for ever."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from shortstack.engine.load import from_directory
from shortstack.errors import ShortstackError, UsageError
from shortstack.quantization import process
from shortstack.quantization.worker import Job, use_own_attention

Built = Callable[..., Path]

JOB = Job("model", "out", "", "W4A16", {"64": ["mlp.up_proj"]}, [[1, 2]], "bfloat16", "static", 0.01, True)


def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A Python of the tests' own in the place of the worker's; `job` and `report(...)` are there for the body."""
    script = tmp_path / "worker"
    script.write_text(
        f"#!{sys.executable}\nimport json, os, signal, sys\njob = json.load(open(sys.argv[3]))\n"
        "def report(**what):\n    json.dump(what, open(job['report'], 'w'))\n" + body
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def failed(**error: object) -> str:
    described = {"kind": "ValueError", "says": "no", "hint": "", "errno": None, **error}
    return f"report(error={described!r}, traceback='Traceback ...')\n"


def run(**options: str) -> tuple[dict[str, object], list[int]]:
    counted: list[int] = []
    return process.run_worker(JOB, **{"source": "model", "device": "cpu", **options}, advance=counted.append), counted  # type: ignore[arg-type]


def test_a_report_and_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "print(7, flush=True); print('something else'); print(2)\n"
    worker(tmp_path, monkeypatch, body + "report(usage={}, job=job, cuda=os.environ['CUDA_VISIBLE_DEVICES'])\n")
    found, counted = run()
    assert counted == [7, 2]
    assert found["job"]["groups"] == {"64": ["mlp.up_proj"]}  # type: ignore[index]
    assert found["cuda"] == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert run(device="cuda:1")[0]["cuda"] == "5"


@pytest.mark.parametrize(
    ("body", "says", "hint"),
    [
        (
            "sys.stderr.write('loading\\nImportError: libfoo\\n'); sys.exit(3)\n",
            "ended with code 3: ImportError: libfoo",
            "",
        ),
        ("sys.exit(0)\n", "ended with code 0: it printed nothing", ""),
        ("os.kill(os.getpid(), signal.SIGKILL)\n", "was killed; there may be too little memory", "--samples"),
        (failed(), "llm-compressor cannot quantize it: ValueError: no", "--debug"),
        (failed(says="can't allocate memory: 9 GB"), "out of memory", "--samples"),
        (failed(kind="ShortstackError", says="place: wrong", hint="do so"), "place: wrong", "do so"),
    ],
)
def test_one_line_for_each_failure(
    body: str, says: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker(tmp_path, monkeypatch, body)
    with pytest.raises(ShortstackError, match=says) as caught:
        run()
    assert hint in caught.value.hint
    assert not isinstance(caught.value, UsageError)
    assert "\n" not in caught.value.message


def test_a_full_disk_is_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker(tmp_path, monkeypatch, failed(kind="OSError", errno=errno.ENOSPC))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        run()
    assert caught.value.errno == errno.ENOSPC


def test_the_worker_ends_when_nobody_waits(tmp_path: Path) -> None:
    """Its stdin is a pipe of the process that started it, which closes however that one ends."""
    import subprocess

    job = tmp_path / "job.json"
    job.write_text(json.dumps({**JOB.__dict__, "model": str(tmp_path), "report": str(tmp_path / "report")}))
    code = (
        "import sys, time; from shortstack.quantization import worker\n"
        "worker._quantized = lambda job: time.sleep(600)\n"
        f"sys.argv = ['worker', {str(job)!r}]\nworker.main()\n"
    )
    started = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert started.stdin is not None
    started.stdin.close()
    assert started.wait(timeout=120) == 1
    assert not (tmp_path / "report").exists()


def test_windows_are_calibrated_with_the_attention_of_the_model(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """llm-compressor asks for the eager one, which is another function of transformers."""

    model, _ = from_directory(built("llama"), dtype=torch.float32)
    ids = torch.tensor([[1, 44, 75, 80, 91, 12, 7, 3]])
    own = model(ids).logits
    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    use_own_attention(model)
    used = AttentionInterface()["eager"]
    calls = []

    def counted(*tensors: Any, **how: Any) -> Any:
        calls.append(1)
        return used(*tensors, **how)

    monkeypatch.setitem(AttentionInterface._global_mapping, "eager", counted)
    model.config._attn_implementation = "eager"
    assert torch.allclose(model(ids).logits, own, atol=1e-5)
    assert len(calls) == model.config.num_hidden_layers


def test_a_model_that_has_no_attention_of_torch_keeps_its_own(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    model, _ = from_directory(built("gpt_oss"), dtype=torch.float32)
    use_own_attention(model)
    assert "eager" not in AttentionInterface().valid_keys()
