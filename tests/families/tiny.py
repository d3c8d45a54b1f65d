"""Tiny checkpoints of every family, built on the spot, and what they must give when blocks go."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from shortstack.checkpoint.reader import Checkpoint
from shortstack.families.open_model import open_checkpoint
from tests.families.configs import CONFIGS, DEPTH, GENERIC, LISTS

# First, last, middle, apart, both ends, a run; and what special families need beside them.
SETS: tuple[tuple[int, ...], ...] = ((0,), (5,), (2,), (1, 3), (0, 5), (3, 4))
MORE_SETS: dict[str, tuple[tuple[int, ...], ...]] = {
    "glm_moe_dsa": ((3, 4, 5), (1, 2)),
    "hy_v4": ((3, 4, 5), (1, 2)),
    "qwen4_exp_text": ((1, 2), (3,)),
    "zamba2": ((0, 2), (1, 4)),
    "zamba2@mem1": ((4,),),
    "jamba@p2": ((0, 1), (2, 3), (4, 5)),
    "gpt2@scaled": ((4, 5), (3, 4, 5)),
    "diffllama": ((4, 5), (3, 4, 5)),
    "ernie4_5_moe@int2": ((4, 5),),
    "rwkv@norescale": ((4, 5), (1,)),
    # no attention, or one type of block, would be left
    **dict.fromkeys(
        (
            "bamba", "granitemoehybrid", "kimi_linear", "lfm2", "lfm2_moe", "qwen3_5_text", "qwen3_next", "zamba",
            "qwen3_5@composite",
            "qwen3_5_moe_text",
            "qwen3_5_moe@composite",
        ),
        ((1, 4, 5),),
    ),
    "nemotron_h": ((1, 5),),
    "olmo_hybrid": ((1, 4, 5), (0, 2, 3)),
    "recurrent_gemma": ((2, 5),),
}  # fmt: skip
WINDOWS = torch.randint(3, 90, (2, 14), generator=torch.Generator().manual_seed(1))


def config_of(name: str) -> Any:
    """The tiny configuration of `family` or `family@variant`."""
    family = name.partition("@")[0]
    given = dict(CONFIGS[name])
    dropped = given.pop("_drop", [])
    count = given.pop("_n", DEPTH)
    given.pop("_seqlen", None)
    known: set[str] = set()
    for base in CONFIG_MAPPING[family].__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    known |= set(getattr(CONFIG_MAPPING[family], "attribute_map", {}))
    common = {key: value for key, value in GENERIC.items() if key in known and key not in dropped}
    if count != DEPTH:
        common["num_hidden_layers"] = count
    return AutoConfig.for_model(family, **{**common, **given})


def build(directory: Path, name: str, *, seed: int = 0) -> Path:
    """Write a checkpoint with every parameter random (norms and biases too, so that nothing is neutral)."""
    torch.manual_seed(seed)
    factory = AutoModelForImageTextToText if name.endswith("@composite") else AutoModelForCausalLM
    model = factory.from_config(config_of(name)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for index, (key, parameter) in enumerate(sorted(model.named_parameters())):
            if parameter.is_floating_point():
                scale = 0.08 + 0.04 * (index % 4)
                centre = 1.0 if "norm" in key and parameter.ndim == 1 and key.endswith("weight") else 0.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + centre)
    model.save_pretrained(directory)
    if name.endswith("@rule"):
        path = directory / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in config.items() if key not in LISTS}))
    return directory


def load(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    """As a user loads it: (model, what transformers says of missing and unexpected keys)."""
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}  # the fused ones know no float64
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True, **experts)
    return model.eval(), info


def blocks_of(model: Any, checkpoint: Checkpoint) -> nn.ModuleList:
    """The list of blocks, found by its length and by the parameters in it."""
    lists = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == checkpoint.depth and "vision" not in name
    ]
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


@contextlib.contextmanager
def passed_over(model: Any, checkpoint: Checkpoint, removed: Sequence[int]) -> Iterator[None]:
    """The reference: the blocks' forward is replaced by the identity, in the form that each gives."""
    blocks, carried = blocks_of(model, checkpoint), checkpoint.anatomy.family.carried
    forms: dict[int, Any] = {}
    handles = [
        block.register_forward_hook(lambda _, __, output, index=index: forms.__setitem__(index, output))
        for index, block in enumerate(blocks)
    ]
    with torch.no_grad():
        model(input_ids=WINDOWS[:1, :4], use_cache=False)
    for handle in handles:
        handle.remove()

    def identity(index: int) -> Any:
        parameters = list(inspect.signature(blocks[index].forward).parameters)

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            hidden, form = given[parameters[0]], forms[index]
            if isinstance(form, (tuple, list)):
                return type(form)([hidden, given.get(carried), *[None] * len(form)][: len(form)])
            return hidden

        return forward

    for index in removed:
        blocks[index].forward = identity(index)
    try:
        yield
    finally:
        for index in removed:
            del blocks[index].forward


PROMPTS = (WINDOWS[:1, :6], WINDOWS[1:, 4:9], torch.arange(40, 47)[None])


def greedy(model: Any, use_cache: bool) -> list[Any]:
    """Eight tokens after each of a few prompts; the name of the error where the model cannot."""
    made: list[Any] = []
    for ids in PROMPTS:
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        try:
            made.append(model.generate(ids, use_cache=use_cache, **options).tolist())
        except Exception as error:
            made.append(type(error).__name__)
    return made


def sets_of(name: str) -> list[tuple[int, ...]]:
    """The sets of blocks that are tried."""
    return list(dict.fromkeys([*SETS, *MORE_SETS.get(name, ())]))


__all__ = ["WINDOWS", "blocks_of", "build", "greedy", "load", "open_checkpoint", "passed_over", "sets_of"]
