"""Which engine runs a model: one block at a time where its blocks allow it, the whole model in memory where not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from shortstack.checkpoint.drop_blocks import reason_against
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import size
from shortstack.errors import ShortstackError
from shortstack.runtime.memory import available_bytes

if TYPE_CHECKING:
    import torch

    from shortstack.engine.interface import Engine
    from shortstack.engine.streamed import StreamedModel

MemoryMode = Literal["auto", "resident", "streamed"]

_RESIDENT_SHARE = 0.25  # of the memory that is free: what `auto` lets a model take
_DEVICE_SHARE = 0.6  # the same of a GPU, which is there for this
_ACTIVATIONS_SHARE = 0.6  # of the memory that is free: what hidden states may take before they are swept in groups


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is to run.

    Attributes:
        dtype, device: what is computed in and on.
        memory: `streamed` holds two blocks, `resident` keeps all; `auto` keeps a model that fits well.
        stream_bytes: the most that streams may take at once; None for what `memory_bytes` leaves them.
        group: candidates swept together, where an earlier run has decided it.
        tokens: tokens that are run at a time; None for what suits the device.
        trust_remote_code: run code that comes with the checkpoint.
        memory_bytes: the most that all hidden states may take, streams and kept inputs; None for 60 % of what is free.
        keeps_inputs: what goes into each block is kept, for a backward sweep.
        shows_hidden: what goes into a block is kept while the block is run.
        candidates: positions of the blocks to score, ascending; None for all.
        say: is given a line where the engine changes what was chosen.
    """

    dtype: torch.dtype
    device: torch.device
    memory: MemoryMode = "auto"
    stream_bytes: int | None = None
    group: int | None = None
    tokens: int | None = None
    trust_remote_code: bool = False
    memory_bytes: int | None = None
    keeps_inputs: bool = False
    shows_hidden: bool = False
    candidates: tuple[int, ...] | None = None
    say: Callable[[str], object] = lambda _: None


def with_less_memory(options: EngineOptions, engine: Engine | None, seq_len: int) -> EngineOptions | None:
    """What to try after a run out of memory: fewer tokens at a time down to one window, then block by block; or None.

    Args:
        options: what ran out of memory.
        engine: what ran with them, if it came so far.
        seq_len: tokens of one window.
    """
    if engine is not None and engine.tokens // 2 >= seq_len:
        return replace(options, tokens=engine.tokens // 2)
    streamed = engine is not None and (engine.memory == "streamed" or engine.reason)
    if options.memory != "streamed" and not streamed:
        return replace(options, memory="streamed", tokens=None)
    return None


def choose_engine(checkpoint: Checkpoint, windows: Sequence[Sequence[int]] | None, options: EngineOptions) -> Engine:
    """The engine for a checkpoint: what its family's row says, or what its blocks turn out to be given.

    Raises:
        ShortstackError: the model must be held whole, and is too large for that or `streamed` was requested.
    """
    from shortstack.engine.block_model import NotSeparableError

    reason = checkpoint.anatomy.family.resident
    if not reason:
        try:
            return _streamed(checkpoint, windows, options)
        except NotSeparableError as error:
            reason = error.reason
    if options.memory == "streamed":
        raise ShortstackError(
            f"{checkpoint.source}: --memory streamed, but {reason}",
            hint="leave --memory out; the model is then held whole",
        )
    options.say(f"{checkpoint.source}: the whole model is held in memory, and runs once per block: {reason}")
    return _whole(checkpoint, windows, options, reason)


def open_blocks(checkpoint: Checkpoint, options: EngineOptions) -> StreamedModel:
    """A model whose blocks are run one at a time.

    Raises:
        NotSeparableError: they cannot be.
    """
    from shortstack.engine.block_model import NotSeparableError

    if reason := checkpoint.anatomy.family.resident:
        raise NotSeparableError(checkpoint.source, reason)
    return _streamed(checkpoint, None, options)


def _streamed(checkpoint: Checkpoint, windows: Sequence[Sequence[int]] | None, options: EngineOptions) -> StreamedModel:
    import torch

    from shortstack.engine.block_model import Skeleton
    from shortstack.engine.streamed import StreamedModel

    resident = _kept(checkpoint, options)
    skeleton = Skeleton(
        checkpoint,
        dtype=options.dtype,
        device=options.device,
        tokens=options.tokens,
        trust_remote_code=options.trust_remote_code,
        say=options.say,
    )
    candidates = checkpoint.depth if options.candidates is None else len(options.candidates)
    group, graph_bytes = options.group or candidates, 0
    if windows is not None:
        one = torch.tensor(windows[:1], device=options.device)
        skeleton.calls(one)  # raises where blocks are given what depends on the text
        stream = skeleton.first_hidden(one)
        stream_bytes = stream.numel() * stream.element_size() * len(windows)
        limit = options.stream_bytes
        if limit is None:
            weights = sum(checkpoint.block_parameters()) * options.dtype.itemsize if resident else 0
            limit = _left_for_streams(checkpoint, stream_bytes, candidates, weights, options)
        group = options.group or _group_size(candidates, stream_bytes, limit)
        if group < candidates:
            options.say(
                f"the hidden states of {candidates} candidates take {size((candidates + 1) * stream_bytes)}: "
                f"{group} are computed at a time, and the weights are read {-(-candidates // group)} times"
            )
        graph_bytes = limit - 2 * stream_bytes if resident else 0
    return StreamedModel(
        skeleton, resident=resident, group=group, candidates=options.candidates, graph_bytes=graph_bytes
    )


def _kept(checkpoint: Checkpoint, options: EngineOptions) -> bool:
    """Whether blocks, once read, stay."""
    if options.memory != "auto":
        return options.memory == "resident"
    needed = checkpoint.parameters() * options.dtype.itemsize
    if options.device.type == "cuda":
        return needed < _DEVICE_SHARE * available_bytes(options.device)
    return max(checkpoint.nbytes, needed) < _RESIDENT_SHARE * available_bytes()


def _left_for_streams(
    checkpoint: Checkpoint, stream_bytes: int, candidates: int, weights_bytes: int, options: EngineOptions
) -> int:
    """Bytes for streams, of what hidden states may take; the weights that are to stay are not there yet."""
    kept = (checkpoint.depth + 1 if options.keeps_inputs else int(options.shows_hidden)) * stream_bytes
    asked = options.memory_bytes
    if asked is None:
        return int(_ACTIVATIONS_SHARE * (available_bytes(options.device) - weights_bytes)) - kept
    needed = kept + _fewest_streams(candidates) * stream_bytes
    if asked < needed:
        raise ShortstackError(
            f"--memory-limit {size(asked)}: hidden states of all windows take {size(needed)}, one candidate at a time",
            hint="fewer --samples, a smaller --seq-len"
            + (", or no criterion that needs gradients" if options.keeps_inputs else ""),
        )
    return asked - kept


def _group_size(candidates: int, stream_bytes: int, limit_bytes: int) -> int:
    """How many candidates are swept together, where streams may take `limit_bytes`: at least one, whatever fits."""
    if _streams(candidates, candidates) * stream_bytes <= limit_bytes:
        return candidates
    return max(1, limit_bytes // stream_bytes - _fewest_streams(candidates) + 1)


def _fewest_streams(candidates: int) -> int:
    """How many streams are held at once where one candidate is swept at a time."""
    return _streams(1, candidates)


def _streams(together: int, candidates: int) -> int:
    """A stream per candidate of the group and the base stream; where others follow, also where that is for the next group."""
    return together + 1 + (together < candidates)


def _whole(
    checkpoint: Checkpoint, windows: Sequence[Sequence[int]] | None, options: EngineOptions, reason: str
) -> Engine:
    import torch

    from shortstack.engine.load import load_model
    from shortstack.engine.whole_model import WholeModel

    model, _, _ = load_model(
        checkpoint,
        dtype=str(options.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        device=str(options.device),
        trust_remote_code=options.trust_remote_code,
    )
    depth = checkpoint.depth
    unremovable = [
        index
        for index in range(depth)
        if reason_against(checkpoint, [other for other in range(depth) if other != index]) is not None
    ]
    sample = torch.tensor(windows[:1] if windows else [[0, 0]], device=options.device)
    return WholeModel(
        model,
        checkpoint,
        sample,
        reason=reason,
        tokens=options.tokens,
        unremovable=unremovable,
        candidates=options.candidates,
    )
