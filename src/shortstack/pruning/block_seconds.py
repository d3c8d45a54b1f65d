"""What a token takes in each block of a model here, and in the rest of it: measured, for a budget of speed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.artifacts.results import Result, load_results
from shortstack.checkpoint.reader import Checkpoint
from shortstack.errors import ShortstackError
from shortstack.runtime.devices import pick_device, pick_dtype

if TYPE_CHECKING:
    from shortstack.engine.interface import Engine


@dataclass(frozen=True)
class BlockSeconds:
    """Seconds that one token of one text takes.

    Attributes:
        blocks: in each block, by position.
        outside: in embeddings, final norm and head.
        device, dtype: where and in what it was computed.
        of: what was timed.
    """

    blocks: tuple[float, ...]
    outside: float
    device: str = ""
    dtype: str = ""
    of: str = "one token at a time, one text, short"

    def told(self, removed: Collection[int]) -> dict[str, Any]:
        """What a plan says of it: how many times as fast the model is expected to be without blocks (by position)."""
        whole = self.outside + sum(self.blocks)
        left = whole - sum(self.blocks[place] for place in removed)
        return {
            "expected": whole / left,
            "of": self.of,
            "block_seconds": list(self.blocks),
            "outside_seconds": self.outside,
            "device": self.device,
            "dtype": self.dtype,
        }


NOT_TIMED = BlockSeconds((), 0.0)


def block_seconds(checkpoint: Checkpoint, engine: Engine | None = None, *, times: Path | None = None) -> BlockSeconds:
    """Time the blocks of a model that may not be loaded yet.

    Args:
        checkpoint: the model.
        engine: runs it, where one is there; else one is opened for this, on the device that `auto` is.
        times: nothing is timed: they are those of a record of `shortstack bench`.
    """
    if times is not None:
        return benched_seconds(checkpoint, times)
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


def benched_seconds(checkpoint: Checkpoint, path: Path) -> BlockSeconds:
    """What a token takes in a block by `shortstack bench` of the model and of it without blocks: the slope over depth.

    Raises:
        ShortstackError: the record holds no such times, or the model's blocks are not alike.
    """
    hint = "shortstack bench MODEL PRUNED --out bench.json"
    if len(set(checkpoint.block_parameters())) > 1:
        raise ShortstackError(
            f"--times {path}: the blocks of {checkpoint.source} differ in size, and times of whole models do not say "
            "what each takes",
            hint="leave --times out: blocks are timed here",
        )
    timed = [one for one in load_results(path).results if one.what == "bench" and _token(one) is not None]
    dense = next((one for one in timed if one.fingerprint == checkpoint.fingerprint), None)
    if dense is None:
        raise ShortstackError(f"--times {path}: holds no time per token of {checkpoint.source}", hint=hint)
    alike = [one for one in timed if _conditions(one) == _conditions(dense)]
    per_block = _slope([(one.settings["blocks"], _token(one) or 0.0) for one in alike])
    if per_block is None:
        raise ShortstackError(
            f"--times {path}: holds no model of fewer blocks beside {checkpoint.source}: what a block takes is not known",
            hint=hint,
        )
    whole = _token(dense) or 0.0
    if not 0 < per_block * checkpoint.depth <= 1.1 * whole:
        raise ShortstackError(
            f"--times {path}: by these times a block takes {per_block:.3g} s of the {whole:.3g} s of a token, in "
            f"{checkpoint.depth} blocks: the models are not of one family, or the times are too noisy",
            hint="a bench with more --runs, on a quiet machine",
        )
    of = ", ".join(f"{name} {dense.settings[name]}" for name in ("engine", "batch", "prompt_tokens", "new_tokens"))
    blocks = (min(per_block, whole / checkpoint.depth),) * checkpoint.depth
    return BlockSeconds(blocks, whole - sum(blocks), str(dense.settings["device"]), str(dense.settings["dtype"]), of)


def _token(result: Result) -> float | None:
    figure = result.figures.get("tpot")
    return figure.value if figure is not None else None


def _conditions(result: Result) -> list[Any]:
    names = ("engine", "engine_version", "batch", "prompt_tokens", "new_tokens", "dtype", "device")
    return [result.settings.get(name) for name in names]


def _slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Of the straight line through points, by least squares; None where they are all at one place."""
    middle = sum(x for x, _ in points) / len(points)
    height = sum(y for _, y in points) / len(points)
    spread = sum((x - middle) ** 2 for x, _ in points)
    return sum((x - middle) * (y - height) for x, y in points) / spread if spread else None
