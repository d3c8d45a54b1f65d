"""What width pruning refuses, by name and before anything is computed; and what it says that heads could not do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shortstack.errors import ShortstackError, UsageError
from tests.pruning.width.material import narrow

Built = Callable[..., Path]


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"ratio": 0.9}, "would leave no head or no channel in a block: at most", "at most"),
    ({"ratio": 0.3, "only": "heads"}, "--ratio 0.3 would leave no head in a block: at most 1", "--ratio 0.1"),
    ({"ratio": 0.7, "only": "mlp"}, "would leave no channel in a block", "--ratio 0.42"),
    ({"params": "1K"}, "--params 1K would leave no head or no channel", "--params "),
    ({"params": "9M"}, "the model has", "a smaller number"),
    ({"ratio": 0.2, "only": "mlp", "multiple_of": 64}, "--multiple-of 64: a block has 48 channels", "a smaller"),
    ({"params": "40K", "only": "heads", "head_unit": "query-heads"}, "would leave no head", "--params 56992"),
    ({"ratio": 0.0001}, "nothing would be removed", "--ratio 0.0"),
    ({}, "give one of --ratio and --params (found none)", "--ratio 0.2"),
    ({"ratio": 0.2, "params": "30K"}, "(found both)", "--ratio 0.2"),
]


@pytest.mark.fault(119)
@pytest.mark.parametrize(("options", "message", "hint"), REFUSED)
def test_what_cannot_be(
    options: dict[str, Any], message: str, hint: str, built: Built, rows: Path, tmp_path: Path
) -> None:
    """A ratio that leaves no head, and its kind: before anything is computed, with the next step."""
    with pytest.raises(ShortstackError) as refused:
        narrow(built("llama"), tmp_path / "w", tmp_path / "missing.txt", **options)
    assert message in str(refused.value)
    assert hint in (refused.value.hint or "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.0}, {"ratio": 1.0}, {"ratio": float("nan")}, {"ratio": 0.2, "multiple_of": 0},
        {"ratio": 0.2, "only": "mlp", "head_unit": "query-heads"}, {"ratio": 0.2, "only": "heads", "multiple_of": 8},
    ],
)  # fmt: skip
def test_options_that_contradict_themselves(options: dict[str, Any], built: Built, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        narrow(built("llama"), tmp_path / "w", rows, **options)


def test_what_heads_could_not_do_is_reported(built: Built, rows: Path, tmp_path: Path) -> None:
    """Six of eight heads do not divide a hidden size of 32."""
    source = built("llama", num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    result = narrow(source, tmp_path / "w", rows, ratio=0.2)
    assert result.after["heads"] in (4, 8)
    assert f"{result.after['heads']} heads are kept, although 6 would fit better" in result.to_text()
    few = narrow(source, tmp_path / "few", rows, ratio=0.02)
    assert few.after["heads"] == 8
    assert "no head is removed: without one head the share would be further" in few.to_text()


def test_one_key_value_head(tiny_model: Callable[[str], Path], built: Built, rows: Path, tmp_path: Path) -> None:
    """No group can go; query heads can."""
    source = built("gemma", num_key_value_heads=1)
    with pytest.raises(ShortstackError, match="no head can be removed: it has one key-value head") as refused:
        narrow(source, tmp_path / "w", rows, ratio=0.1, only="heads")
    assert "--head-unit query-heads" in (refused.value.hint or "")
    assert (
        "no head is removed: there is one key-value head" in narrow(source, tmp_path / "m", rows, ratio=0.2).to_text()
    )
    result = narrow(source, tmp_path / "w", rows, ratio=0.1, only="heads", head_unit="query-heads", verify=True)
    assert (result.after["heads"], result.after["kv_heads"]) == (2, 1) or result.after["heads"] == 3


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "falcon", "opt", "gpt_neox"])
def test_other_families_are_refused_by_name(family: str, built: Built, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ShortstackError, match=f"blocks of {family} cannot be made narrower; supported are .*llama.*qwen3"
    ):
        narrow(built(family), tmp_path / "w", rows, ratio=0.2)


def edited_config(directory: Path, **entries: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return directory


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_key_value_heads": 4}, "self_attn.q_proj"),
        ({"intermediate_size": 64}, "mlp.gate_proj is"),
        ({"intermediate_size": [48] * 6}, "expected whole numbers"),
        ({"num_attention_heads": 0}, "expected whole numbers"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized"),
    ],
)
def test_configs_that_do_not_fit(
    copied: Built, rows: Path, tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    with pytest.raises(ShortstackError, match=message):
        narrow(edited_config(copied("llama"), **entries), tmp_path / "w", rows, ratio=0.2)


def test_tensors_that_are_not_known(copied: Built, rows: Path, tmp_path: Path) -> None:
    """What becomes of a tensor is known, or it is refused by name; so are blocks that differ."""
    from safetensors.torch import save_file

    source = copied("llama")
    tensors = load_file(source / "model.safetensors")
    odd = {**tensors, **{f"model.layers.{block}.self_attn.sinks": torch.ones(4) for block in range(6)}}
    save_file(odd, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ShortstackError, match=r"model.layers.0.self_attn.sinks, \[4\], cannot be put into a narrower block"
    ):
        narrow(source, tmp_path / "w", rows, ratio=0.2)
    name = "model.layers.3.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name][:40].contiguous()}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ShortstackError, match=r"\[40, 32\] in block 3, \[48, 32\] in the first"):
        narrow(source, tmp_path / "w", rows, ratio=0.2)


@pytest.mark.parametrize("out", ["MODEL", "MODEL/inside"])
def test_the_input_is_never_touched(out: str, built: Built, rows: Path) -> None:
    source = built("llama")
    with pytest.raises(ShortstackError, match="the input"):
        narrow(source, Path(out.replace("MODEL", str(source))), rows, ratio=0.2)
