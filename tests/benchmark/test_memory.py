"""Peak memory, in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.benchmark import memory
from shortstack.benchmark.engines import EngineError, Workload
from tests.benchmark.material import subject, workload

_CHILD = """
import json, os, signal, sys
json.loads(sys.stdin.readline())
print(json.dumps({"load_peak_bytes": 5}), flush=True)
for line in sys.stdin:
    batch = json.loads(line)["batch"]
    if batch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if batch == 3:
        sys.exit("RuntimeError: cannot be")
    print(json.dumps({"peak_rss_bytes": batch, "pid": os.getpid()}), flush=True)
"""


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_COMMAND", [sys.executable, "-S", "-c", _CHILD])


def taken(path: Path, workloads: list[Workload]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    memory.measured_memory(subject(path), "transformers", workloads, lambda one, took: found.update({one.batch: took}))
    return found


def test_a_real_run(built: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "INTERVAL_SECONDS", 0.01)
    found = taken(built("llama"), [workload(1), workload(4)])
    assert set(found) == {1, 4}
    for one in found.values():
        assert one["load_peak_bytes"] > 1e7
        assert one["peak_rss_bytes"] > 1e7
        assert one["peak_device_bytes"] is None
        assert len(one["readings"]) >= 3
        assert {"load", "seconds"} <= set(one["readings"][0])
    json.dumps(found)


@pytest.mark.usefixtures("child")
def test_what_the_system_ends_does_not_fit_and_the_rest_goes_on(built: Callable[..., Path]) -> None:
    found = taken(built("llama"), [workload(1), workload(2), workload(4), workload(5)])
    assert "signal 9" in found[2][memory.NO_MEMORY]
    assert (found[1]["peak_rss_bytes"], found[4]["peak_rss_bytes"]) == (1, 4)
    assert found[1]["load_peak_bytes"] == 5
    assert found[1]["pid"] != found[4]["pid"] == found[5]["pid"]  # a new process after the one that was ended


@pytest.mark.usefixtures("child")
def test_another_end_is_an_error(built: Callable[..., Path]) -> None:
    with pytest.raises(
        EngineError,
        match="peak memory: ended with exit code 1 before it answered; its last message: RuntimeError: cannot",
    ):
        taken(built("llama"), [workload(3)])


def test_a_model_that_cannot_be_loaded(copied: Callable[..., Path]) -> None:
    path = copied("llama")
    one = subject(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(EngineError, match="peak memory: ShortstackError"):
        memory.measured_memory(one, "transformers", [workload()], lambda *_: None)
