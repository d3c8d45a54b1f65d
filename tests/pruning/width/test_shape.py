"""How many heads and channels stay for a ratio: numbers alone."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortstack.errors import ShortstackError
from shortstack.pruning.width.options import HeadUnit, Only, WidthChoice
from shortstack.pruning.width.shape import BlockShape, Width, chosen_width


def shape(
    blocks: int, hidden: int, kv_heads: int, per_group: int, head_dim: int, channels: int, divide: bool
) -> BlockShape:
    return BlockShape(
        blocks, hidden, kv_heads * per_group, kv_heads, head_dim, channels, ("mlp.gate_proj", "mlp.up_proj"),
        per_query=2 * head_dim * hidden, per_kv=2 * head_dim * hidden, per_channel=3 * hidden, heads_divide_hidden=divide,
    )  # fmt: skip


SMOLLM2 = shape(30, 576, 3, 3, 64, 1536, True)
SMOLLM2_PARAMETERS = 134_515_008
LLAMA_7B = shape(32, 4096, 32, 1, 128, 11008, True)
LLAMA_7B_PARAMETERS = 6_738_415_616
LLAMA_3_8B = shape(32, 4096, 8, 4, 128, 14336, True)
QWEN3_8B = shape(36, 4096, 8, 4, 128, 12288, False)


@pytest.mark.parametrize(
    ("of", "choice", "expected"),
    [
        # a third of the attention is the nearest to a quarter of the channels
        (SMOLLM2, WidthChoice(ratio=0.2), Width(2, 3, 1188)),
        (SMOLLM2, WidthChoice(ratio=0.2, multiple_of=64), Width(2, 3, 1216)),
        # one of three query heads of every group is nearer still
        (SMOLLM2, WidthChoice(ratio=0.2, head_unit="query-heads"), Width(3, 2, 1146)),
        (SMOLLM2, WidthChoice(ratio=0.2, only="mlp"), Width(3, 3, 1018)),
        (SMOLLM2, WidthChoice(ratio=0.1, only="heads"), Width(2, 3, 1536)),
        (SMOLLM2, WidthChoice(ratio=0.15, only="heads"), Width(1, 3, 1536)),
        (SMOLLM2, WidthChoice(params="100M", only="heads"), None),
    ],
)
def test_smollm2(of: BlockShape, choice: WidthChoice, expected: Width | None) -> None:
    if expected is None:
        with pytest.raises(ShortstackError, match="would leave no head"):
            chosen_width(of, SMOLLM2_PARAMETERS, choice, "here")
    else:
        assert chosen_width(of, SMOLLM2_PARAMETERS, choice, "here") == expected


def test_numbers_of_heads_that_the_config_class_refuses() -> None:
    """hidden_size of Llama 7B has no divisor between 16 and 32: 24 heads of 32 would not load."""
    assert chosen_width(LLAMA_7B, LLAMA_7B_PARAMETERS, WidthChoice(ratio=0.2), "here").heads in (16, 32)
    free = dataclasses.replace(LLAMA_7B, heads_divide_hidden=False)
    assert chosen_width(free, LLAMA_7B_PARAMETERS, WidthChoice(ratio=0.2), "here").heads in range(24, 27)


SHAPES = st.builds(
    shape, st.integers(1, 4), st.sampled_from([8, 24, 32, 36]), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4),
    st.integers(1, 70), st.booleans(),
)  # fmt: skip


@given(
    SHAPES, st.floats(0.01, 0.99), st.sampled_from([None, "mlp", "heads"]), st.sampled_from(["kv-groups", "query-heads"]),
    st.sampled_from([1, 8]), st.integers(0, 5000),
)  # fmt: skip
def test_any_choice(of: BlockShape, ratio: float, only: Only, unit: HeadUnit, multiple: int, outside: int) -> None:
    """Within the ratio, as near to it as one channel (or, of heads alone, one unit), or refused; never without a head."""
    if (only == "mlp" and unit != "kv-groups") or (only == "heads" and multiple != 1):
        return
    everything = of.removed(Width(0, 0, 0))
    try:
        width = chosen_width(of, everything + outside, WidthChoice(ratio, None, only, unit, multiple), "here")
    except ShortstackError as refused:
        assert refused.hint
        return
    target = ratio * (everything + outside)
    assert width != of.whole
    assert 1 <= width.kv_heads <= of.kv_heads
    assert 1 <= width.per_group <= of.per_group
    assert 1 <= width.channels <= of.channels
    assert width.channels % multiple == 0 or width.channels == of.channels
    assert not of.heads_divide_hidden or width.heads == of.heads or of.hidden % width.heads == 0
    assert of.removed(width) <= target + 1e-6
    if only is None and multiple == 1 and width.channels > 1:
        assert target - of.removed(width) < 2 * of.blocks * of.per_channel
    if only == "mlp":
        assert target - of.removed(width) < of.blocks * of.per_channel * (2 * multiple)
