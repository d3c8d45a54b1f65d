"""Prove that a pruned checkpoint computes what the original computes with those blocks skipped."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint.anatomy import max_positions, shortened_config
from shortstack.checkpoint.reader import Checkpoint, open_checkpoint, tensor_chunks
from shortstack.errors import ShortstackError
from shortstack.loading import load_with_transformers
from shortstack.machine import available_bytes
from shortstack.planning import PrunePlan
from shortstack.tables import size

if TYPE_CHECKING:
    import torch

_WINDOWS = 2
_SEQ_LEN = 64
_ROOM = 0.7  # share of free memory that two models in float32 may take


def verify_pruned(original: Checkpoint, plan: PrunePlan, directory: Path) -> str:
    """Compare a pruned checkpoint with its original: every tensor byte, every config entry, and logits bit for bit.

    transformers loads both in float32 on the CPU (no key may be missing or unexpected); in the original, the removed
    blocks are bypassed. Models that do not fit twice are compared block by block by shortstack's own engine instead.

    Returns:
        What was compared, in a line.

    Raises:
        ShortstackError: anything differs.
    """
    pruned = open_checkpoint(directory)
    kept = [original.position_of(index) for index in plan.kept]
    if pruned.original_blocks != plan.kept:
        raise _failed(directory, f"shortstack.json lists blocks {pruned.original_blocks}, the plan keeps {plan.kept}")
    _compare_config(original, pruned, kept)
    compared = _compare_bytes(original, pruned, kept)
    ids_BT = _random_windows(original)
    needed = 4 * (original.parameters() + pruned.parameters())
    if needed < _ROOM * available_bytes():
        how = "transformers"
        pairs = (_bypassed_logits(original, kept, ids_BT), _loaded_logits(pruned, ids_BT))
    else:
        how = "the streaming engine"  # which, too, refuses any tensor that is missing or has no place
        pairs = (_streamed_logits(original, kept, ids_BT), _streamed_logits(pruned, range(pruned.depth), ids_BT))
    expected, found = pairs
    if not _equal_bits(expected, found):
        worst = float((expected - found).abs().max())
        raise _failed(directory, f"logits differ from the original with the blocks skipped (by up to {worst:.3g})")
    shape = " x ".join(map(str, found.shape))
    return f"{compared} tensors equal byte for byte ({size(pruned.nbytes)}), {shape} logits equal bit for bit ({how})"


def _compare_config(original: Checkpoint, pruned: Checkpoint, kept: list[int]) -> None:
    expected = shortened_config(original.config, original.anatomy, kept, original.source)
    for key in sorted(expected.keys() | pruned.config.keys()):
        if json.dumps(expected.get(key)) != json.dumps(pruned.config.get(key)):
            raise _failed(
                pruned.directory, f"config.json: {key} is {pruned.config.get(key)!r}, expected {expected.get(key)!r}"
            )


def _compare_bytes(original: Checkpoint, pruned: Checkpoint, kept: list[int]) -> int:
    pairs = {tensor.name: tensor for tensor in original.outside_blocks}
    for new, old in enumerate(kept):
        for tensor in original.blocks[old]:
            pairs[original.anatomy.block_name(new, original.anatomy.within_block(tensor.name))] = tensor
    if pairs.keys() != pruned.tensors.keys():
        odd = sorted(pairs.keys() ^ pruned.tensors.keys())
        raise _failed(pruned.directory, f"tensor {odd[0]!r} is missing or left over ({len(odd)} such)")
    for name, source in pairs.items():
        copy = pruned.tensors[name]
        same = (copy.dtype, copy.shape) == (source.dtype, source.shape)
        if not same or any(a != b for a, b in zip(tensor_chunks(source), tensor_chunks(copy), strict=True)):
            raise _failed(pruned.directory, f"tensor {name!r} differs from {source.name!r} of the original")
    return len(pairs)


def _random_windows(checkpoint: Checkpoint) -> torch.Tensor:
    import torch

    rows = checkpoint.tensors[checkpoint.anatomy.embedding].shape[0]
    length = min(_SEQ_LEN, max_positions(checkpoint.config) or _SEQ_LEN)
    generator = random.Random(0)
    return torch.tensor([[generator.randrange(rows) for _ in range(length)] for _ in range(_WINDOWS)])


def _loaded_logits(checkpoint: Checkpoint, ids_BT: torch.Tensor) -> torch.Tensor:
    import torch

    model, info = load_with_transformers(checkpoint, dtype=torch.float32)
    _refuse_odd_keys(checkpoint, info)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits


def _bypassed_logits(checkpoint: Checkpoint, kept: list[int], ids_BT: torch.Tensor) -> torch.Tensor:
    import torch
    from torch import nn

    model, _ = load_with_transformers(checkpoint, dtype=torch.float32)
    layers = model.get_submodule(checkpoint.anatomy.family.prefix.rstrip("."))
    skipped = set(range(checkpoint.depth)) - set(kept)

    def skip(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    for index in skipped:
        layers[index].register_forward_hook(skip, with_kwargs=True)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits


def _streamed_logits(checkpoint: Checkpoint, order: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    import torch

    from shortstack.engine.skeleton import Skeleton
    from shortstack.engine.weights import BlockWeights

    device = torch.device("cpu")
    skeleton = Skeleton(checkpoint, dtype=torch.float32, device=device)
    with (
        torch.no_grad(),
        BlockWeights(checkpoint, skeleton.blocks, dtype=torch.float32, device=device, resident=False) as weights,
    ):
        hidden = skeleton.first_hidden(ids_BT)
        for index, block in weights.each(list(order)):
            hidden = skeleton.run_block(block, hidden, skeleton.calls(ids_BT)[index])
        return skeleton.logits(hidden, ids_BT)


def _refuse_odd_keys(checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info.get(problem, ()))
        if keys:
            kind = problem.replace("_", " ")
            raise _failed(checkpoint.directory, f"transformers reports {kind}: {keys[0]} ({len(keys)} in all)")


def _equal_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    import torch

    return first.shape == second.shape and torch.equal(first.view(torch.int32), second.view(torch.int32))


def _failed(directory: Path, what: str) -> ShortstackError:
    return ShortstackError(
        f"{directory}: verification failed: {what}", hint="nothing was published; please report this"
    )
