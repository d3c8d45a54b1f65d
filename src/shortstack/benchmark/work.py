"""What a run of a checkpoint must do at least: operations and bytes, by blocks and the rest. No torch.

Floors and ideal speed-ups both come from here, so that they mean the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint.reader import Checkpoint

if TYPE_CHECKING:
    from shortstack.benchmark.engines import Workload

# What an engine computes in or stores weights in -> bytes of a number; of others (Q8_0) it is not known what kernels read.
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "F32": 4, "F16": 2, "BF16": 2}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


@dataclass(frozen=True)
class Work:
    """Parameters that every token goes through, and what they cost.

    Attributes:
        blocks: parameters of each block, matrices and all.
        head: parameters of the output head; where it is tied to the embedding, those of the embedding.
        attention: width of all query heads together, of one block: what the products of attention cost.
        cache_bytes: of keys and values, per token and block, in what is computed in; 0 where that is not known.
        parameter_bytes: of one parameter, as it is computed.
        unknown: why floors and ideals cannot be told from the checkpoint; empty where they can.
    """

    blocks: tuple[int, ...]
    head: int
    attention: int = 0
    cache_bytes: int = 0
    parameter_bytes: float = 4.0
    unknown: str = ""

    @classmethod
    def of(cls, checkpoint: Checkpoint, itemsize: int) -> Work:
        """Of a checkpoint that is computed with so many bytes per number."""
        anatomy, text = checkpoint.anatomy, checkpoint.text_config
        embedding = checkpoint.tensors[anatomy.embedding]
        head = checkpoint.tensors.get(anatomy.head) if anatomy.head and not checkpoint.tied else None
        per_token = checkpoint.kv_bytes_per_token() if _attends_to_all(text) else None
        return cls(
            tuple(checkpoint.block_parameters()),
            (head or embedding).numel,
            _attention_width(text) if per_token else 0,
            round(per_token / checkpoint.depth * itemsize / 2) if per_token else 0,
            itemsize,
            _unknown(checkpoint),
        )

    @classmethod
    def stored(cls, checkpoint: Checkpoint, precision: str) -> Work:
        """Of a checkpoint that an engine holds in this type."""
        itemsize = ITEM_BYTES.get(precision)
        work = cls.of(checkpoint, itemsize or 1)
        if itemsize is None and not work.unknown:
            return replace(work, unknown=f"weights of type {precision}: what its kernels read is not known")
        return work

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights that a step reads."""
        return round((sum(self.blocks) + self.head) * self.parameter_bytes)

    def prefill_operations(self, workload: Workload) -> float:
        """Until the first token: every block on every token of the prompts, the head on the last of each."""
        tokens, batch = workload.prompt_tokens, workload.batch
        attention = 2 * self.attention * tokens * tokens * len(self.blocks)  # scores and sums, half of it masked
        return float(batch * (2 * sum(self.blocks) * tokens + attention + 2 * self.head))

    def step_operations(self, workload: Workload) -> float:
        """Of one further token of every sequence."""
        attention = 4 * self.attention * self._context(workload) * len(self.blocks)
        return workload.batch * (2 * (sum(self.blocks) + self.head) + attention)

    def step_bytes(self, workload: Workload) -> float:
        """Weights once, and the cache of every sequence."""
        cache = workload.batch * self._context(workload) * self.cache_bytes * len(self.blocks)
        return self.weight_bytes + cache

    def held_bytes(self, workload: Workload, parameters: int) -> float:
        """What a run holds at least: all weights, and the longest cache."""
        longest = workload.prompt_tokens + workload.new_tokens
        cache = workload.batch * longest * self.cache_bytes * len(self.blocks)
        return parameters * self.parameter_bytes + cache

    def without(self, kept: Sequence[int]) -> Work:
        """The same with some of the blocks, by position."""
        return Work(
            tuple(self.blocks[position] for position in kept), self.head, self.attention, self.cache_bytes,
            self.parameter_bytes, self.unknown,
        )  # fmt: skip

    @staticmethod
    def _context(workload: Workload) -> float:
        """Tokens in the cache, on average over the run."""
        return workload.prompt_tokens + workload.new_tokens / 2


def cut_of(dense: Checkpoint, other: Checkpoint) -> list[int] | None:
    """Positions of the dense model's blocks that another checkpoint keeps; None where it is no cut of it.

    A checkpoint that does not tell which ones has as many as it has, the first ones: what matters is how many.
    """
    alike = dense.config.get("model_type") == other.config.get("model_type")
    widths = [model.tensors[model.anatomy.embedding].shape for model in (dense, other)]
    if not alike or widths[0] != widths[1] or other.depth > dense.depth:
        return None
    positions = {original: position for position, original in enumerate(dense.original_blocks)}
    if other.provenance is not None and all(original in positions for original in other.original_blocks):
        return [positions[original] for original in other.original_blocks]
    return list(range(other.depth))


def _unknown(checkpoint: Checkpoint) -> str:
    text = checkpoint.text_config
    if any(isinstance(text.get(key), int) and text[key] > 1 for key in _EXPERTS):
        return "a mixture of experts: which weights a token reads is not known"
    if checkpoint.config.get("quantization_config"):
        return "quantized: what its kernels read is not known"
    return ""


def _attends_to_all(text: dict[str, Any]) -> bool:
    """Whether every block keeps the whole context, as far as the config tells."""
    return all(kind == "full_attention" for kind in text.get("layer_types") or [])


def _attention_width(text: dict[str, Any]) -> int:
    heads, hidden = (
        text.get(a, text.get(b)) for a, b in (("num_attention_heads", "n_head"), ("hidden_size", "n_embd"))
    )
    return int(heads * text["head_dim"] if heads and text.get("head_dim") else hidden or 0)
