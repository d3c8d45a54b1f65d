"""The model without its blocks' weights: how it is built."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from shortstack.checkpoint.reader import Checkpoint
from shortstack.engine import select
from shortstack.engine.block_model import NotSeparableError, Skeleton
from shortstack.engine.interface import ForwardRequest, GradientRequest, Windows
from shortstack.engine.select import EngineOptions
from shortstack.families.open_model import open_checkpoint
from shortstack.retraining.batch_states import BatchModel
from shortstack.retraining.validation import streamed_nll
from tests import pico

Built = Callable[..., Path]
CPU = torch.device("cpu")


def test_other_threads_build_modules_of_their_own_meanwhile(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may load a model while another is scored: what it builds has weights."""
    checkpoint, real, made = open_checkpoint(built()), AutoModelForCausalLM.from_config, []

    def from_config(*arguments: Any, **options: Any) -> Any:
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2).weight))
        thread.start()
        thread.join()
        return real(*arguments, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", from_config)
    Skeleton(checkpoint, dtype=torch.float32, device=CPU)
    assert [weight.is_meta for weight in made] == [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_are_the_models_own_and_no_parameter_takes_memory(built: Built, dtype: torch.dtype) -> None:
    checkpoint, random = open_checkpoint(built("gemma3_text")), torch.get_rng_state()
    skeleton = Skeleton(checkpoint, dtype=dtype, device=CPU)
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.is_meta for block in skeleton.blocks for parameter in block.parameters())
    expected = dict(pico.load(built("gemma3_text"), dtype).named_buffers())
    found = dict(skeleton._model.named_buffers())
    assert found.keys() == expected.keys() != set()
    for name, table in expected.items():
        assert found[name].dtype == table.dtype
        assert torch.equal(found[name], table), name


def test_a_table_that_the_model_does_not_make_again_is_not_made_up(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands in memory that nobody wrote would be taken for it."""
    from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", lambda *_: None)
    with pytest.raises(NotSeparableError, match="tables that cannot be built"):
        Skeleton(open_checkpoint(built()), dtype=torch.float32, device=CPU)


@pytest.fixture
def no_cycles_are_looked_for() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_cycles_are_looked_for")
@pytest.mark.parametrize("kind", ["streamed", "whole", "batches"])
def test_a_model_goes_when_it_is_let_go(built: Built, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for Python to look for cycles: the next model that is opened takes its memory."""
    if kind == "whole":

        def not_separable(checkpoint: Checkpoint, *_: Any) -> Any:
            raise NotSeparableError(checkpoint.source, "for a test")

        monkeypatch.setattr(select, "_streamed", not_separable)
    weight = (_measured_in_batches if kind == "batches" else _swept)(open_checkpoint(built("llama")))
    assert weight() is None


def _swept(checkpoint: Checkpoint) -> weakref.ref[torch.Tensor]:
    """Every kind of sweep; gives the embedding, which nothing here holds any more."""
    ids, options = pico.windows(), EngineOptions(torch.float32, torch.device("cpu"))
    windows, ones = Windows.of(ids), torch.ones(4)
    with contextlib.closing(select.choose_engine(checkpoint, ids, options)) as engine:
        forward = engine.forward(windows, ForwardRequest(keep_inputs=True, keep_graphs=True))
        engine.backward(windows, forward, GradientRequest(ones, lambda *_: None))
        engine.forward(windows, ForwardRequest(branches=True, on_logits=lambda *_: None))
        engine.nll_without(windows, [frozenset({1})])
        engine.gate_gradients(windows, [{1: 0.5}], ones)
        engine.token_seconds()
        model: Any = engine
        whole = model.skeleton._model if engine.memory == "streamed" or not engine.reason else model._model
        return weakref.ref(whole.get_input_embeddings().weight)


def _measured_in_batches(checkpoint: Checkpoint) -> weakref.ref[torch.Tensor]:
    ids_BT = torch.tensor(pico.windows())
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, -3:] = 0
    batch = {"input_ids": ids_BT, "targets": ids_BT.roll(-1, 1), "attention_mask": mask_BT}
    model = BatchModel(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    streamed_nll(model, [batch, batch])
    model.close()
    whole: Any = model.skeleton._model
    return weakref.ref(whole.get_input_embeddings().weight)
