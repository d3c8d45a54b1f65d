"""Prove that a pruned checkpoint computes what the original computes with those blocks skipped."""

from __future__ import annotations

import random
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shortstack.checkpoint.byte_copy import TensorCopy, same_bytes
from shortstack.checkpoint.drop_blocks import Cut
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import size
from shortstack.common.json_text import json_text
from shortstack.common.phases import phase
from shortstack.engine.load import aligned, load_with_transformers
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.plan import PlannedCut
from shortstack.runtime.memory import available_bytes

if TYPE_CHECKING:
    import torch

_WINDOWS = 2
_SEQ_LEN = 64
_ROOM = 0.7  # share of free memory that two models in float32 may take


class Verified(NamedTuple):
    """What was compared.

    Attributes:
        says: in a line, with what was not.
        logits: whether logits were; tensors and config always are.
    """

    says: str
    logits: bool


@phase("verifying")
def verify_pruned(original: Checkpoint, planned: PlannedCut, directory: Path) -> Verified:
    """Compare a pruned checkpoint with its original: every tensor byte, every config entry, and logits bit for bit.

    transformers loads both in float32 on the CPU (no key may be missing or unexpected); in the original, the removed
    blocks are bypassed. Models that do not fit twice are compared block by block by shortstack's own engine instead.

    Returns:
        What was compared: all of it, or all but the logits of a model that neither fits twice nor can be streamed.

    Raises:
        ShortstackError: anything differs.
    """
    import torch

    pruned = open_checkpoint(directory, family=original.anatomy.family)
    plan, cut = planned
    if pruned.original_blocks != plan.kept:
        raise failed(directory, f"shortstack.json lists blocks {pruned.original_blocks}, the plan keeps {plan.kept}")
    compare_config(cut, pruned)
    compared = compare_bytes(cut, pruned)
    ids_BT = random_windows(original)
    needed = 4 * (original.parameters() + pruned.parameters())
    if needed < _ROOM * available_bytes():
        how = "transformers"
        expected, known = _bypassed_logits(original, cut, ids_BT)
        found = loaded_logits(pruned, ids_BT, known)
    else:
        from shortstack.engine.block_model import NotSeparableError
        from shortstack.engine.streamed import streamed_logits

        how = "the streaming engine"  # which, too, refuses any tensor that is missing or has no place
        try:
            expected = streamed_logits(original, cut.kept, ids_BT)
            found = streamed_logits(pruned, range(pruned.depth), ids_BT)
        except NotSeparableError as error:
            return Verified(
                f"config.json as planned, {compared} tensors equal byte for byte ({size(pruned.nbytes)}); logits not "
                f"compared: the model does not fit in memory twice, and {error.reason}",
                logits=False,
            )
    if found.shape != expected.shape or not expected.view(torch.int32).equal(found.view(torch.int32)):
        worst = float((expected - found).abs().max())
        raise failed(directory, f"logits differ from the original with the blocks skipped (by up to {worst:.3g})")
    shape = " x ".join(map(str, found.shape))
    return Verified(
        f"{compared} tensors equal byte for byte ({size(pruned.nbytes)}), {shape} logits equal bit for bit ({how})",
        logits=True,
    )


def compare_config(cut: Cut, pruned: Checkpoint) -> None:
    """Every entry of config.json is what the cut makes of it, or an error."""
    expected = cut.config
    for key in sorted(expected.keys() | pruned.config.keys()):
        if json_text(expected.get(key)) != json_text(pruned.config.get(key)):
            raise failed(
                pruned.directory, f"config.json: {key} is {pruned.config.get(key)!r}, expected {expected.get(key)!r}"
            )


def compare_bytes(cut: Cut, pruned: Checkpoint, *, changed: Collection[str] = ()) -> int:
    """How many tensors there are; each, but those that were changed, has the bytes that the cut keeps, or it is an error."""
    expected = {copy.name: copy for copy in cut.tensors}
    if expected.keys() != pruned.tensors.keys():
        odd = sorted(expected.keys() ^ pruned.tensors.keys())
        raise failed(pruned.directory, f"tensor {odd[0]!r} is missing or left over ({len(odd)} such)")
    for name, copy in expected.items():
        found = pruned.tensors[name]
        same = (found.dtype, found.shape) == (copy.source.dtype, copy.shape)
        if not same or (name not in changed and not same_bytes(copy, TensorCopy(found, name))):
            raise failed(pruned.directory, f"tensor {name!r} differs from {copy.source.name!r} of the original")
    return len(expected)


def random_windows(checkpoint: Checkpoint) -> torch.Tensor:
    """Token ids of two short windows, the same ones each time."""
    import torch

    rows = checkpoint.tensors[checkpoint.anatomy.embedding].shape[0]
    length = min(_SEQ_LEN, checkpoint.positions or _SEQ_LEN)
    generator = random.Random(0)
    return torch.tensor([[generator.randrange(rows) for _ in range(length)] for _ in range(_WINDOWS)])


def loaded_logits(checkpoint: Checkpoint, ids_BT: torch.Tensor, known: dict[str, Any]) -> torch.Tensor:
    """Logits through transformers, which may find no key odd but those that are `known`."""
    import torch

    model, info = load_with_transformers(checkpoint, dtype=torch.float32)
    _refuse_odd_keys(checkpoint, info, known)
    with torch.no_grad():
        logits: torch.Tensor = aligned(model)(input_ids=ids_BT, use_cache=False).logits
    return logits


def _bypassed_logits(checkpoint: Checkpoint, cut: Cut, ids_BT: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """(logits with the other blocks bypassed, what transformers says of the original's keys)."""
    import torch

    from shortstack.engine.stand_ins import bypassed_logits

    model, info = load_with_transformers(checkpoint, dtype=torch.float32)
    removed = set(range(checkpoint.depth)) - set(cut.kept)
    return bypassed_logits(aligned(model), checkpoint.anatomy, removed, ids_BT), info


def _refuse_odd_keys(checkpoint: Checkpoint, info: dict[str, Any], known: dict[str, Any]) -> None:
    """No key may be odd that was not so before: a composite's vision tower is left out of its language model."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted({str(key) for key in info.get(problem, ())} - {str(key) for key in known.get(problem, ())})
        if keys:
            kind = problem.replace("_", " ")
            raise failed(checkpoint.directory, f"transformers reports {kind}: {keys[0]} ({len(keys)} in all)")


def failed(directory: Path, what: str) -> ShortstackError:
    """The error of a check that found a difference."""
    return ShortstackError(
        f"{directory}: verification failed: {what}", hint="no output was written; please report this"
    )
