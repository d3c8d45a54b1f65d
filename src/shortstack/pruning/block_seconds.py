"""What a token takes in each block of a model here, and in the rest of it: measured, for a budget of speed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint.reader import Checkpoint
from shortstack.runtime.devices import pick_device, pick_dtype

if TYPE_CHECKING:
    from shortstack.engine.select import Engine


@dataclass(frozen=True)
class BlockSeconds:
    """Seconds that one token of one text takes.

    Attributes:
        blocks: in each block, by position.
        outside: in embeddings, final norm and head.
        device, dtype: where and in what it was computed.
    """

    blocks: tuple[float, ...]
    outside: float
    device: str = ""
    dtype: str = ""

    def told(self, removed: Collection[int]) -> dict[str, Any]:
        """What a plan says of it: how many times as fast the model is expected to be without blocks (by position)."""
        whole = self.outside + sum(self.blocks)
        left = whole - sum(self.blocks[place] for place in removed)
        return {
            "expected": whole / left,
            "of": "one token at a time, one text, short",
            "block_seconds": list(self.blocks),
            "outside_seconds": self.outside,
            "device": self.device,
            "dtype": self.dtype,
        }


NOT_TIMED = BlockSeconds((), 0.0)


def block_seconds(checkpoint: Checkpoint, engine: Engine | None = None) -> BlockSeconds:
    """Time the blocks of a model that may not be loaded yet.

    Args:
        checkpoint: the model.
        engine: runs it, where one is there; else one is opened for this, on the device that `auto` is.
    """
    if engine is not None:
        blocks, outside = engine.token_seconds()
        return BlockSeconds(tuple(blocks), outside, str(engine.device), str(engine.dtype).removeprefix("torch."))
    import contextlib

    from shortstack.engine.cpu import computing
    from shortstack.engine.select import EngineOptions, choose_engine
    from shortstack.runtime.libraries import import_transformers

    import_transformers()
    device = pick_device("auto")
    dtype = pick_dtype("auto", checkpoint.tensors[checkpoint.anatomy.embedding].dtype, device)
    opened = choose_engine(checkpoint, [[0, 1]], EngineOptions(dtype, device))
    with contextlib.closing(opened), computing(dtype, device):
        return block_seconds(checkpoint, opened)
