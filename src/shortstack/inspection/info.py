"""What a checkpoint is, told from its config and headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from shortstack.common.formatting import count, ranges, size
from shortstack.common.options import stage
from shortstack.common.shown import Shown
from shortstack.families.open_model import open_model


@dataclass(frozen=True, repr=False)
class Info(Shown):
    """What `shortstack info` tells; counts are of parameters, sizes are bytes on disk."""

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

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {"schema": 1, **asdict(self)}

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
            ("fingerprint", self.fingerprint[:16] or "not computed: the weights were not downloaded"),
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join([self.source, *(f"  {name.ljust(width)}  {value}" for name, value in lines)])

    def _removed_before(self) -> str:
        if self.original_blocks == list(range(self.blocks)):
            return ""
        return f" (blocks {ranges(self.original_blocks)} of the original model)"


@stage
def info(model: str, *, allow_links: bool = False) -> Info:
    """Show what a checkpoint is: family, blocks, parameters, sizes, and what one block less saves.

    Args:
        model: a checkpoint directory, a hub id such as `org/name@revision`, or `embedded`.
        allow_links: follow links in the checkpoint that lead out of its directory.

    Returns:
        The facts; no tensor is read for them but the 8 KiB per tensor that the fingerprint takes. Of a hub id that is
        not in the cache, headers are read on the hub, and no weights are downloaded.

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
    )
