"""Several processes share the windows of one scoring run: the same scores, one voice, and a word when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from shortstack.cli.app import run
from shortstack.errors import UsageError
from shortstack.runtime.distributed import Process
from tests.kills import Warm
from tests.retraining.material import texts
from tests.retraining.processes import launched

Built = Callable[..., Path]

CRITERIA = "ppl,taylor,taylor:p=2,batch=2,magnitude"


def arguments(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    return [
        "score",
        str(model),
        "--data",
        str(text),
        "--criterion",
        CRITERIA,
        "--seq-len",
        "16",
        "--out",
        str(out),
        *more,
    ]


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["calibration"] == other["calibration"]
    assert one["criteria"].keys() == other["criteria"].keys()
    for name, entry in one["criteria"].items():
        assert entry["scores"] == pytest.approx(other["criteria"][name]["scores"], rel=1e-6), name
        assert entry["order"] == other["criteria"][name]["order"]
        if entry["stderr"] is not None:
            assert entry["stderr"] == pytest.approx(other["criteria"][name]["stderr"], rel=1e-4)
        for index, tensors in entry.get("tensors", {}).items():
            assert tensors == pytest.approx(other["criteria"][name]["tensors"][index], rel=1e-5)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", ["--memory", "streamed"]),
        pytest.param("mixtral", [], marks=pytest.mark.slow),
        pytest.param("gemma2", ["--memory", "resident"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_the_scores_of_one(
    family: str, options: list[str], built: Built, warm: Warm, tmp_path: Path
) -> None:
    """Seven windows: the parts differ in size."""
    model, text, log = built(family), texts(tmp_path / "t.jsonl"), tmp_path / "log.txt"
    command = arguments(model, text, tmp_path / "two.json", "--samples", "7", "--csv", str(tmp_path / "csv"), *options)
    assert warm.run(command, log, processes=2)["code"] == 0, log.read_text()
    said = log.read_text()
    assert said.count("lowest = least important") == 4  # one process speaks, of four criteria
    assert run(arguments(model, text, tmp_path / "one.json", "--samples", "7", *options)) == 0
    two = read(tmp_path / "two.json")
    assert two["settings"]["processes"] == 2
    assert_same(two, read(tmp_path / "one.json"))
    assert list((tmp_path / "csv").glob("*/block_order.csv"))
    assert not list(tmp_path.glob(".*work*"))


@pytest.mark.slow
def test_a_family_that_is_held_whole(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model, text = tiny_model("gemma3n_text"), tmp_path / "ids.jsonl"
    rows = [json.dumps({"input_ids": [(7 * row + 3 * place) % 90 + 3 for place in range(16)]}) for row in range(5)]
    text.write_text("\n".join(rows))
    process = launched("ddp", 2, arguments(model, text, tmp_path / "two.json", "--samples", "5"), tmp_path)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert run(arguments(model, text, tmp_path / "one.json", "--samples", "5")) == 0
    assert_same(read(tmp_path / "two.json"), read(tmp_path / "one.json"))


def test_parts_are_all_windows_in_order() -> None:
    for world in (1, 2, 3, 5):
        parts = [Process(rank, world).part(11) for rank in range(world)]
        assert [window for part in parts for window in range(11)[part]] == list(range(11))
    with pytest.raises(UsageError, match="3 windows for 4 processes"):
        Process(1, 4).part(3)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run(built: Built, tmp_path: Path) -> None:
    """SIGKILL to one of two: the launcher fails within seconds, nothing is written, and what was saved stays."""
    model = built("llama", num_hidden_layers=24, hidden_size=64, intermediate_size=256)
    text = texts(tmp_path / "t.jsonl", rows=200)
    out = tmp_path / "scores.json"
    command = arguments(model, text, out, "--samples", "100", "--save-every", "0")
    process = launched("ddp", 2, command, tmp_path)
    work = tmp_path / ".scores.json.shortstack-work"
    states = [work / f"process-{rank}/state.safetensors" for rank in (0, 1)]
    deadline = time.monotonic() + 120
    while not all(state.is_file() for state in states) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    victims = [one for one in psutil.Process(process.pid).children() if one.environ().get("RANK") == "1"]
    os.kill(victims[0].pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0, said
    assert not out.exists()
    assert all(state.is_file() for state in states)
    again = launched("ddp", 2, command, tmp_path)
    said, _ = again.communicate(timeout=240)
    assert again.returncode == 0, said
    assert "resuming from the saved state" in said
    assert run(arguments(model, text, tmp_path / "one.json", "--samples", "100")) == 0
    assert_same(read(out), read(tmp_path / "one.json"))
