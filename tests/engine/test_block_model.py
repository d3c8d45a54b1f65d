"""The model without its blocks' weights: how it is built."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from shortstack.engine.block_model import NotSeparableError, Skeleton
from shortstack.families.open_model import open_checkpoint
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
