"""Which layers are quantized, in groups of what size: from headers alone, and refused in words where none can be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_checkpoint
from shortstack.quantization.layers import chosen_layers, expected_nbytes
from shortstack.quantization.schemes import SCHEMES, scheme_named

Built = Callable[..., Path]
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "koqv")
WIDE = {"hidden_size": 128, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 2}


def test_each_kind_has_the_largest_group_that_divides_it(built: Built) -> None:
    checkpoint = open_checkpoint(built(**WIDE))
    choice = chosen_layers(checkpoint, SCHEMES["W4A16"])
    found = {size: set(kinds) for size, kinds in choice.groups.items()}
    wide = {"mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"}
    assert found == {128: wide, 64: {"self_attn.o_proj"}, 32: {"mlp.down_proj"}}
    assert choice.dense == {}
    assert choice.group_size("mlp.down_proj") == 32
    assert choice.group_size("input_layernorm") is None


def test_what_no_group_divides_is_named_and_left_dense(built: Built) -> None:
    checkpoint = open_checkpoint(built(**{**WIDE, "intermediate_size": 80}))
    choice = chosen_layers(checkpoint, SCHEMES["W4A16"])
    assert choice.dense == {"mlp.down_proj": "80 inputs are no whole number of groups of 128 or 64 or 32"}
    assert chosen_layers(checkpoint, SCHEMES["W8A8"]).groups[0] == tuple(
        sorted((*ATTENTION, "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"))
    )
    assert chosen_layers(checkpoint, SCHEMES["NVFP4A16"]).dense == {}


def test_a_named_group_size_and_no_other(built: Built) -> None:
    checkpoint = open_checkpoint(built(**WIDE))
    choice = chosen_layers(checkpoint, SCHEMES["W8A16"], 128)
    assert list(choice.groups) == [128]
    assert set(choice.dense) == {"mlp.down_proj", "self_attn.o_proj"}


def test_a_group_size_that_divides_nothing(built: Built) -> None:
    checkpoint = open_checkpoint(built(**WIDE))
    with pytest.raises(
        ShortstackError, match="no layer can be quantized to W4A16: .*128 inputs .* groups of 100"
    ) as caught:
        chosen_layers(checkpoint, SCHEMES["W4A16"], 100)
    assert caught.value.hint.startswith("leave --group-size out")
    odd = open_checkpoint(built(hidden_size=36, head_dim=12, intermediate_size=44, num_hidden_layers=2))
    with pytest.raises(ShortstackError, match="no layer can be quantized") as caught:
        chosen_layers(odd, SCHEMES["W4A16"])
    assert "W8A8" in caught.value.hint


@pytest.mark.parametrize(("scheme", "size"), [("W8A8", 64), ("NVFP4A16", 32), ("W4A16", 0)])
def test_a_group_size_that_is_none(scheme: str, size: int) -> None:
    with pytest.raises(UsageError, match=f"--group-size {size}: "):
        SCHEMES[scheme].with_group_size(size)


def test_an_unknown_scheme() -> None:
    with pytest.raises(UsageError, match="--scheme W3A16: unknown"):
        scheme_named("W3A16")


@pytest.mark.fault(29)
def test_what_is_quantized_already_is_refused(copied: Callable[..., Path]) -> None:
    model = copied(num_hidden_layers=2)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ShortstackError, match="is quantized already"):
        chosen_layers(open_checkpoint(model), SCHEMES["W8A8"])


def test_experts_are_refused(built: Built) -> None:
    with pytest.raises(ShortstackError, match=r"is a mixture of experts \(.*experts"):
        chosen_layers(open_checkpoint(built("mixtral")), SCHEMES["W8A8"])


def test_the_machine_lacks_what_a_scheme_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for scheme in SCHEMES.values():
        scheme.refuse_device(cpu)
    monkeypatch.delattr(torch, "float8_e4m3fn")
    SCHEMES["W4A16"].refuse_device(cpu)
    for name in ("FP8_DYNAMIC", "NVFP4A16"):
        with pytest.raises(ShortstackError, match=f"--scheme {name}: cpu has no float8_e4m3fn with torch"):
            SCHEMES[name].refuse_device(cpu)


def test_the_expected_size_is_smaller_and_counts_what_stays_dense(built: Built) -> None:
    checkpoint = open_checkpoint(built(**WIDE, dtype=torch.bfloat16))
    sizes = {name: expected_nbytes(checkpoint, s, chosen_layers(checkpoint, s)) for name, s in SCHEMES.items()}
    assert sizes["W4A16"] < sizes["W8A16"] < checkpoint.nbytes
    dense = sum(tensor.nbytes for tensor in checkpoint.outside_blocks)
    assert all(size > dense for size in sizes.values())
