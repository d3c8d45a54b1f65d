"""The facts of a checkpoint that its config and headers state."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from shortstack.checkpoint.drop_blocks import reason_against
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import count, ranges, size
from shortstack.common.options import stage
from shortstack.common.shown import Shown
from shortstack.families.open_model import open_model


@dataclass(frozen=True, repr=False)
class Info(Shown):
    """The facts of a checkpoint.

    Attributes:
        source: The checkpoint, as it was named in the call.
        directory: The directory that holds the checkpoint.
        family: The `model_type` of the config.
        blocks: The number of blocks.
        original_blocks: The number of each block in the original model.
        parameters: The number of parameters of the model.
        parameters_per_block: The number of parameters of each block.
        parameters_embedding: The number of parameters of the token embedding.
        parameters_head: The number of parameters of the output head; 0 if it is tied to the embedding.
        parameters_other: The number of all other parameters outside the blocks.
        tied: Whether the output head and the token embedding are one tensor.
        dtypes: The number of bytes stored in each data type.
        nbytes: The size of all tensors in bytes.
        block_bytes: The size of each block in bytes.
        shards: The number of weight files.
        positions: The longest sequence in tokens; None if the config does not limit it.
        kv_bytes_per_token: The size of the key-value cache in bytes per token in 16 bits; None if it is unknown.
        fingerprint: The fingerprint of the checkpoint; empty if the weights were not downloaded.
        not_removable: The blocks that cannot be removed exactly, by their numbers in the original model, each with the
            reason.
        some_sets_refused: Whether some sets are refused although each of their blocks could be removed alone.
    """

    source: str
    directory: str
    family: str
    blocks: int
    original_blocks: list[int]
    parameters: int
    parameters_per_block: list[int]
    parameters_embedding: int
    parameters_head: int
    parameters_other: int
    tied: bool
    dtypes: dict[str, int]
    nbytes: int
    block_bytes: list[int]
    shards: int
    positions: int | None
    kv_bytes_per_token: int | None
    fingerprint: str
    not_removable: dict[int, str]
    some_sets_refused: bool

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        not_removable = {str(block): reason for block, reason in self.not_removable.items()}
        return {"schema": 1, **asdict(self), "not_removable": not_removable}

    def to_text(self) -> str:
        """What a person reads on the terminal."""
        sizes = sorted(set(self.parameters_per_block))
        per_block = count(sizes[0]) if len(sizes) == 1 else f"{count(sizes[0])} to {count(sizes[-1])}"
        head = "tied to the embedding" if self.tied else count(self.parameters_head)
        saved = max(self.parameters_per_block)
        dtypes = ", ".join(f"{name} ({size(nbytes)})" for name, nbytes in self.dtypes.items())
        lines = [
            ("family", self.family),
            ("blocks", f"{self.blocks}" + self._removed_before()),
            ("parameters", f"{count(self.parameters)} ({self.parameters})"),
            ("  per block", per_block),
            ("  embedding", count(self.parameters_embedding)),
            ("  head", head),
            ("  other", count(self.parameters_other)),
            ("stored as", dtypes),
            ("size", f"{size(self.nbytes)} in {self.shards} file{'s' if self.shards > 1 else ''}"),
            ("positions", str(self.positions) if self.positions else "not limited by the config"),
            (
                "KV cache",
                f"{size(self.kv_bytes_per_token)} per token in 16 bit" if self.kv_bytes_per_token else "unknown",
            ),
            ("one block less", f"-{saved / self.parameters:.2%} parameters, -{size(max(self.block_bytes))}"),
            ("removed exactly", self._removable()),
            ("fingerprint", self.fingerprint[:16] or "not computed: the weights were not downloaded"),
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join([self.source, *(f"  {name.ljust(width)}  {value}" for name, value in lines)])

    def _removable(self) -> str:
        """Which blocks can be removed, in words."""
        possible = [block for block in self.original_blocks if block not in self.not_removable]
        shown = "any block" if not self.not_removable else f"block {ranges(possible)}" if possible else "no block"
        reasons = dict.fromkeys(self.not_removable.values())
        shown += "".join(f"; {reason}" for reason in reasons)
        if self.some_sets_refused and possible:
            shown += "; some sets of blocks are refused: `plan` shows whether yours is"
        return shown

    def _removed_before(self) -> str:
        if self.original_blocks == list(range(self.blocks)):
            return ""
        return f" (blocks {ranges(self.original_blocks)} of the original model)"


@stage
def info(model: str, *, allow_links: bool = False) -> Info:
    """Show a checkpoint's family, blocks, parameters, sizes, and which blocks can be removed.

    Args:
        model: The checkpoint: a directory, a hub id such as `org/name@revision`, or `embedded`.
        allow_links: Follow symbolic links in the checkpoint that lead out of its directory.

    Returns:
        The facts. Only headers and 8 KiB of each tensor (for the fingerprint) are read. For a hub id that is not in the
        cache, headers are read on the hub, and no weights are downloaded.

    Raises:
        ShortstackError: it is not a checkpoint that shortstack can read.
    """
    checkpoint = open_model(model, allow_links=allow_links, headers_only=True)
    anatomy = checkpoint.anatomy
    per_block = checkpoint.block_parameters()
    embedding = checkpoint.tensors[anatomy.embedding].numel
    head = 0 if checkpoint.tied else checkpoint.tensors[anatomy.head].numel if anatomy.head else 0
    total = checkpoint.parameters()
    dtypes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.dtype] += tensor.nbytes
    return Info(
        source=checkpoint.source,
        directory=str(checkpoint.directory),
        family=anatomy.family.model_type,
        blocks=checkpoint.depth,
        original_blocks=list(checkpoint.original_blocks),
        parameters=total,
        parameters_per_block=per_block,
        parameters_embedding=embedding,
        parameters_head=head,
        parameters_other=total - sum(per_block) - embedding - head,
        tied=checkpoint.tied,
        dtypes=dict(dtypes.most_common()),
        nbytes=checkpoint.nbytes,
        block_bytes=[sum(tensor.nbytes for tensor in block) for block in checkpoint.blocks],
        shards=len(checkpoint.shards),
        positions=checkpoint.positions,
        kv_bytes_per_token=checkpoint.kv_bytes_per_token(),
        fingerprint=checkpoint.fingerprint if checkpoint.is_here else "",
        not_removable=_not_removable(checkpoint),
        some_sets_refused=_some_sets_refused(checkpoint),
    )


def _not_removable(checkpoint: Checkpoint) -> dict[int, str]:
    """Original index -> why removing this block alone would not be exact."""
    positions = range(checkpoint.depth)
    reasons = {
        block: reason_against(checkpoint, [other for other in positions if other != position])
        for position, block in enumerate(checkpoint.original_blocks)
    }
    return {block: reason for block, reason in reasons.items() if reason}


def _some_sets_refused(checkpoint: Checkpoint) -> bool:
    """Whether there is a set that is refused: keeping one block alone, the first blocks alone, or the last."""
    if checkpoint.anatomy.family.refusal is None:
        return False
    positions = range(checkpoint.depth)
    sets = [keep for at in positions for keep in ([at], positions[: at + 1], positions[at:])]
    return any(reason_against(checkpoint, keep) for keep in sets)
