"""Weights onto a GPU: who waits for whom. CUDA's streams and events are recorded by stand-ins, since there is none here;
`tests/test_gpu.py` compares the scores where there is one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shortstack.engine.block_weights import Arrived, Transfer

CPU = torch.device("cpu")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is recorded and waited for, in order; streams are named by what they do."""
    entries: list[str] = []

    class Event:
        name = ""

        def record(self, stream: Stream) -> None:
            self.name = f"{stream.name}{sum(entry.startswith(f'record {stream.name}') for entry in entries)}"
            entries.append(f"record {self.name}")

        def synchronize(self) -> None:
            entries.append(f"host waits for {self.name}")

    class Stream:
        def __init__(self, _: Any = None, name: str = "copy") -> None:
            self.name = name

        def wait_event(self, event: Event) -> None:
            entries.append(f"{self.name} waits for {event.name}")

    @contextlib.contextmanager
    def inside(_: Stream) -> Iterator[None]:
        yield

    compute = Stream(name="compute")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: compute)
    return entries


def transfer() -> Transfer:
    return Transfer(CPU, lambda stored: torch.float32 if stored.is_floating_point else stored, lambda name: name[2:])


def block(number: int) -> dict[str, torch.Tensor]:
    return {f"{number}.w": torch.full((2, 3), number, dtype=torch.bfloat16), f"{number}.i": torch.tensor([number])}


def test_copies_wait_for_the_computation_that_used_their_memory(log: list[str]) -> None:
    sent, arrived = transfer(), []
    for number in range(3):
        slot = number % 2
        sent.wait_for_pinned(slot)
        arrived.append(sent.send(block(number), slot, keep=False))
        arrived[-1].wait()
        sent.used(slot)
    assert log == [
        "record copy0", "compute waits for copy0", "record compute0",
        "record copy1", "compute waits for copy1", "record compute1",
        "host waits for copy0", "copy waits for compute0", "record copy2", "compute waits for copy2", "record compute2",
    ]  # fmt: skip
    assert arrived[2].tensors["2.w"].data_ptr() == arrived[0].tensors["0.w"].data_ptr()  # slots take turns
    assert arrived[1].tensors["1.w"].data_ptr() != arrived[0].tensors["0.w"].data_ptr()
    assert arrived[2].tensors["2.w"].dtype == torch.float32
    assert arrived[2].tensors["2.w"].tolist() == [[2.0] * 3] * 2
    assert arrived[2].tensors["2.i"].tolist() == [2]


def test_blocks_that_stay_have_memory_of_their_own(log: list[str]) -> None:
    sent = transfer()
    arrived = [sent.send(block(number), number % 2, keep=True) for number in range(4)]
    for number, one in enumerate(arrived):
        assert one.tensors[f"{number}.w"].tolist() == [[float(number)] * 3] * 2
    assert not any("copy waits" in entry for entry in log)


def test_what_is_there_is_not_waited_for(log: list[str]) -> None:
    assert Arrived(block(1)).wait()["1.i"].tolist() == [1]
    assert log == []
