"""What a run must do at least: by blocks, head and cache; and what is left of it in a cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import shortstack
from shortstack.benchmark import floors
from shortstack.benchmark.floors import Machine, measured_machine
from shortstack.benchmark.report import ideal_speedups
from shortstack.benchmark.sweep import Measured
from shortstack.benchmark.work import Work, cut_of
from shortstack.families.open_model import open_checkpoint
from tests.benchmark.material import subject, workload

CPU = torch.device("cpu")


def test_work_of_a_llama_by_hand(built: Callable[..., Path]) -> None:
    work = Work.of(open_checkpoint(built("llama")), 4)
    block = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48 + 2 * 32  # q, k and v (2 of 4 heads), o, the MLP, norms
    assert work.blocks == (block,) * 6
    assert work.head == 260 * 32
    assert work.weight_bytes == 4 * (6 * block + 260 * 32)
    one = workload(batch=3, prompt=10, new=8)
    attention = 2 * 32 * 10 * 10 * 6
    assert work.prefill_operations(one) == 3 * (2 * 6 * block * 10 + attention + 2 * 260 * 32)
    cache = 2 * 6 * 2 * 8 * 4  # keys and values, blocks, heads, their width, bytes
    assert work.step_bytes(one) == work.weight_bytes + 3 * (10 + 4) * cache


def test_a_tied_head_is_the_embedding(built: Callable[..., Path]) -> None:
    assert Work.of(open_checkpoint(built("gemma")), 2).head == 260 * 32


def test_a_window_is_not_the_whole_context(built: Callable[..., Path]) -> None:
    """The cache of such blocks is smaller than the config's heads say: it is not counted, and the floor stays one."""
    assert Work.of(open_checkpoint(built("gemma2")), 2).cache_bytes == 0


def test_what_cannot_be_known_is_not_made_up(built: Callable[..., Path], copied: Callable[..., Path]) -> None:
    assert "mixture of experts" in Work.of(open_checkpoint(built("mixtral")), 2).unknown
    path = copied("llama") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    assert "quantized" in Work.of(open_checkpoint(path.parent), 2).unknown


def test_the_ideal_of_a_cut(built: Callable[..., Path], tmp_path: Path) -> None:
    shortstack.prune(str(built("llama")), out=tmp_path / "cut", blocks="1,4", quiet=True)
    dense, cut = (Measured(subject(path), "transformers", workload()) for path in (built("llama"), tmp_path / "cut"))
    assert cut_of(dense.subject.checkpoint, cut.subject.checkpoint) == [0, 2, 3, 5]
    ideals, why = ideal_speedups(dense, cut)
    assert why == ""
    work = Work.of(dense.subject.checkpoint, 4)
    assert ideals["decode"] == pytest.approx(
        work.step_bytes(workload()) / work.without([0, 2, 3, 5]).step_bytes(workload())
    )
    assert (
        1 < ideals["decode"] < ideals["prefill"] < 6 / 4
    )  # the head counts once a sequence in the one, always in the other
    # The same however the cut is stored, as a quantized copy is: what matters is which blocks it keeps.
    path = tmp_path / "cut/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    assert ideal_speedups(dense, Measured(subject(tmp_path / "cut"), "transformers", workload())) == (ideals, "")


def test_another_model_is_no_cut(built: Callable[..., Path]) -> None:
    dense = open_checkpoint(built("llama"))
    assert cut_of(dense, open_checkpoint(built("mistral"))) is None
    assert cut_of(dense, open_checkpoint(built("llama", hidden_size=16))) is None
    assert cut_of(dense, open_checkpoint(built("llama", num_hidden_layers=4))) == [0, 1, 2, 3]


def test_floors_are_the_larger_of_bytes_and_operations(built: Callable[..., Path]) -> None:
    work, one = Work.of(open_checkpoint(built("llama")), 4), workload(batch=2, prompt=10, new=8)
    slow_memory, slow_products = Machine(1.0, 1e30), Machine(1e30, 1.0)
    assert slow_memory.prefill_seconds(work, one) == work.weight_bytes
    assert slow_products.prefill_seconds(work, one) == work.prefill_operations(one)
    assert slow_memory.step_seconds(work, one) == work.step_bytes(one)
    assert slow_products.step_seconds(work, one) == work.step_operations(one)
    assert slow_memory.best_of(slow_products) == Machine(1e30, 1e30)


def test_a_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "_WIDEST", {"cpu": 2048})  # as for a user; other tests measure with small products
    machine = measured_machine(CPU, torch.float32, 1 << 20)
    assert machine.bytes_per_second > 0
    assert machine.operations_per_second > 0
