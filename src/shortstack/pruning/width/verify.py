"""Prove that a narrower checkpoint computes what the original computes with the same heads and channels masked to zero."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint.drop_blocks import Cut
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import size
from shortstack.engine.load import load_with_transformers
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.verify import compare_bytes, compare_config, failed, loaded_logits, random_windows
from shortstack.runtime.memory import available_bytes

if TYPE_CHECKING:
    import torch

_ROOM = 0.7  # share of free memory that two models in float32 may take
_CLOSE = 1e-4  # of the largest logit: sums of fewer terms are rounded in another order, in every block


def verify_narrower(original: Checkpoint, cut: Cut, directory: Path) -> str:
    """Compare a narrower checkpoint with its original: every tensor byte, every config entry, and logits.

    Returns:
        What was compared, in a line.

    Raises:
        ShortstackError: anything differs.
    """
    narrower = open_checkpoint(directory, family=original.anatomy.family)
    compare_config(cut, narrower)
    compared = compare_bytes(cut, narrower)
    says = f"{compared} tensors equal byte for byte ({size(narrower.nbytes)})"
    if 4 * (original.parameters() + narrower.parameters()) > _ROOM * available_bytes():
        return f"{says}; logits not compared: both models do not fit in memory together"
    ids_BT = random_windows(original)
    expected, known = masked_logits(original, cut, ids_BT)
    computed = loaded_logits(narrower, ids_BT, known)
    largest = float(expected.abs().max())
    worst = float((expected - computed).abs().max()) / largest if expected.shape == computed.shape else float("inf")
    if not worst <= _CLOSE:
        raise failed(
            directory, f"logits differ from those of the masked original (by up to {worst:.1e} of the largest)"
        )
    shape = " x ".join(map(str, computed.shape))
    return f"{says}, {shape} logits equal to those of the masked original within {worst:.0e} of the largest"


def masked_logits(checkpoint: Checkpoint, cut: Cut, ids_BT: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """(logits of the original with all weights zero that the cut leaves out, what transformers says of its keys)."""
    import torch

    from shortstack.engine.stand_ins import find_blocks

    model, info = load_with_transformers(checkpoint, dtype=torch.float32)
    anatomy = checkpoint.anatomy
    _, blocks = find_blocks(model, anatomy)
    with torch.no_grad():
        for copy in cut.tensors:
            block = anatomy.block_of(copy.source.name)
            if copy.sliced is None or block is None:
                continue
            dim, runs = copy.sliced
            parameter = blocks[block].get_parameter(anatomy.within_block(copy.source.name))
            gone = torch.ones(parameter.shape[dim], dtype=torch.bool)
            for start, stop in runs:
                gone[start:stop] = False
            parameter.index_fill_(dim, gone.nonzero().flatten(), 0)
        logits: torch.Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits, info
