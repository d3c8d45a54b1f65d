"""The engine itself: what blocks are called with, how often weights are read, what is held."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.engine import block_weights as weights
from shortstack.engine.block_model import Skeleton
from shortstack.engine.block_weights import BlockWeights
from shortstack.engine.forward import block_evaluations
from shortstack.engine.interface import ForwardRequest, ForwardResult, Windows
from shortstack.engine.streamed import StreamedModel, streamed_logits
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from tests import pico

Built = Callable[..., Path]
CPU = torch.device("cpu")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each tensor was read."""
    counted: Counter[str] = Counter()
    real = weights.OpenFiles.read

    def read(self: Any, span: Any, pages: memoryview) -> None:
        counted.update(tensor.name for tensor in span.tensors)
        real(self, span, pages)

    monkeypatch.setattr(weights.OpenFiles, "read", read)
    return counted


def run(model: Path, windows: int = 4, *, group: int | None = None, **given: Any) -> ForwardResult:
    request = ForwardRequest(branches=True, **given)
    skeleton = Skeleton(open_checkpoint(model), dtype=torch.float32, device=CPU)
    with contextlib.closing(StreamedModel(skeleton, resident=False, group=group)) as engine:
        return engine.forward(Windows.of(pico.windows(windows)), request)


def test_every_weight_is_read_once_for_all_candidates(built: Built, reads: Counter[str]) -> None:
    """Promise 4."""
    run(built("llama"))
    assert set(reads) == set(open_checkpoint(built("llama")).tensors)
    assert set(reads.values()) == {1}


def test_groups_read_what_they_need(built: Built, reads: Counter[str]) -> None:
    """Three candidates at a time: the second group begins at block 3 and reads nothing before it."""
    run(built("llama"), group=3)
    assert reads["model.layers.2.mlp.up_proj.weight"] == 1
    assert reads["model.layers.3.mlp.up_proj.weight"] == 2


def test_resident_reads_once_for_two_sweeps(built: Built, reads: Counter[str]) -> None:
    checkpoint = open_checkpoint(built("llama"))
    skeleton = Skeleton(checkpoint, dtype=torch.float32, device=CPU)
    with BlockWeights(skeleton, resident=True) as source:
        for _ in range(2):
            assert [index for index, _ in source.each(range(6))] == list(range(6))
    assert set(reads.values()) == {1}


def test_progress_adds_up_to_the_evaluations(built: Built) -> None:
    done: list[int] = []
    run(built("llama"), on_progress=done.append)
    assert sum(done) == block_evaluations(6) == 6 * 7 // 2
    assert block_evaluations(6, 3) == (1 + 2 + 3 + 4 + 4 + 4) + (1 + 2 + 3)


def test_inputs_are_what_the_model_gives_its_blocks(built: Built) -> None:
    found = run(built("llama"), keep_inputs=True)
    assert found.inputs is not None
    model = pico.load(built("llama"))
    seen: list[torch.Tensor] = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.tensor(pico.windows()), use_cache=False)
    for ours, theirs in zip(found.inputs, seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "falcon", "gemma2", "gpt2"])
def test_skeleton_gives_the_models_own_logits(built: Built, family: str) -> None:
    """Recorders and injector: tuples or tensors, masks by layer type, soft-capped logits."""
    ids = torch.tensor(pico.windows(2, 20))
    found = streamed_logits(open_checkpoint(built(family)), range(6), ids)
    with torch.no_grad():
        expected = pico.load(built(family))(input_ids=ids, use_cache=False).logits
    assert torch.equal(found, expected)


def test_blocks_called_with_what_depends_on_the_text_are_refused(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(built("llama"))
    skeleton = Skeleton(checkpoint, dtype=torch.float32, device=CPU)
    real = skeleton.record

    def record(ids: torch.Tensor) -> Any:
        log = real(ids)
        log[0][1].kwargs["original_embeddings"] = ids.float()
        return log

    monkeypatch.setattr(skeleton, "record", record)
    with pytest.raises(ShortstackError, match="depend on the text"):
        skeleton.calls(torch.tensor(pico.windows()))


def test_a_live_cache_is_not_replayed(built: Built) -> None:
    from transformers import DynamicCache

    from shortstack.engine.stand_ins import _without_cache

    assert _without_cache(DynamicCache()) is None
    assert _without_cache((1, 2)) == (1, 2)


@pytest.mark.fault(60)
@pytest.mark.parametrize("resident", [False, True])
def test_a_file_that_shrinks_while_it_is_read_is_an_error(copied: Built, resident: bool) -> None:
    model = copied("llama")
    checkpoint = open_checkpoint(model)
    skeleton = Skeleton(checkpoint, dtype=torch.float32, device=CPU)
    path = model / "model.safetensors"
    with BlockWeights(skeleton, resident=resident) as source:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ShortstackError, match="was changed meanwhile"):
            for _ in source.each(range(6)):
                pass


@pytest.mark.fault(60)
def test_a_file_that_shrinks_after_it_was_read_is_not_missed(copied: Built) -> None:
    """What is kept is memory of the process, and no page of the file."""
    model = copied("llama")
    skeleton = Skeleton(open_checkpoint(model), dtype=torch.float32, device=CPU)
    with BlockWeights(skeleton, resident=True) as source:
        before = [block.mlp.up_proj.weight.clone() for _, block in source.each(range(6))]
        (model / "model.safetensors").write_bytes(b"")
        for index, block in source.each(range(6)):
            assert torch.equal(block.mlp.up_proj.weight, before[index])


@pytest.mark.parametrize("most", [1, 2, 3, 7])
@pytest.mark.parametrize("windows", [1, 3, 5])
def test_out_of_memory_halves_what_is_run_at_a_time_and_goes_on(
    built: Built, monkeypatch: pytest.MonkeyPatch, most: int, windows: int
) -> None:
    """Nothing of a batch that did not fit has been written: the sweep continues in smaller ones, from where it was."""
    expected = run(built("llama"), windows)
    real, refused = Skeleton.run_block, []

    def limited(self: Skeleton, block: Any, hidden: torch.Tensor, call: Any) -> torch.Tensor:
        if len(hidden) > most:
            refused.append(len(hidden))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, block, hidden, call)

    monkeypatch.setattr(Skeleton, "run_block", limited)
    found = run(built("llama"), windows)
    assert found.candidate_nll_NW is not None
    torch.testing.assert_close(found.candidate_nll_NW, expected.candidate_nll_NW, rtol=1e-5, atol=1e-6)
    assert len(refused) <= 7  # what fits is remembered


def test_out_of_memory_with_one_window_is_said(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Skeleton, "run_block", never)
    with pytest.raises(torch.OutOfMemoryError):
        run(built("llama"), 3)
