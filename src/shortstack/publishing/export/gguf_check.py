"""Whether a GGUF file holds the checkpoint that it was made from: every block, every token, every shape, no broken number."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shortstack.checkpoint.gguf import Gguf, read_plain
from shortstack.checkpoint.headers import TensorInfo, read_exactly
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import ranges
from shortstack.common.json_text import json_text, read_json
from shortstack.errors import ShortstackError

# Tensors of a block that have one name in most families, and what they are called in the file. Of these, shapes are compared.
_SAME = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}  # fmt: skip
_NORM = "input_layernorm.weight"  # whose values show which block a block is; the file may hold them plus one
_AGAIN = "convert it with another version of the converter"


def check_gguf(path: Path, checkpoint: Checkpoint, advance: Callable[[int], object] = lambda _: None) -> list[str]:
    """Compare a GGUF file with its checkpoint.

    Args:
        path: the file.
        checkpoint: what it was converted from.
        advance: called with the bytes of tensors that have just been read.

    Returns:
        What could not be compared, a line each.

    Raises:
        ShortstackError: it is cut short, or does not hold the checkpoint.
    """
    with path.open("rb") as stream:
        gguf = Gguf(stream, "the converted file")
        missing = gguf.missing_bytes(path.stat().st_size)
        if missing:
            raise _differs(checkpoint, f"it is cut short: {missing} bytes of its tensors are missing")
        depth = _check_depth(gguf, checkpoint)
        notes = _check_weights(gguf, checkpoint)
        _check_shapes(gguf, checkpoint)
        _check_order(gguf, checkpoint)
        _check_lists(gguf, checkpoint, depth)
        notes += _check_tokens(gguf, checkpoint)
        return notes + _check_numbers(gguf, checkpoint, advance)


def _differs(checkpoint: Checkpoint, what: str, hint: str = _AGAIN) -> ShortstackError:
    return ShortstackError(f"{checkpoint.source}: the converted file is not this checkpoint: {what}", hint=hint)


def _check_depth(gguf: Gguf, checkpoint: Checkpoint) -> int:
    """Its number of blocks, in its metadata and among its tensors; blocks for multi-token prediction may follow."""
    possible = {checkpoint.depth, checkpoint.depth + checkpoint.anatomy.extra}
    count = gguf.metadata.get(f"{gguf.metadata.get('general.architecture')}.block_count")
    if count not in possible:
        raise _differs(checkpoint, f"it states {count} blocks, {checkpoint.depth} were expected")
    numbers = sorted({number for name in gguf.tensors if (number := _block_of(name)) is not None})
    if numbers != list(range(count)):
        raise _differs(checkpoint, f"it holds block {ranges(numbers)}, 0-{count - 1} were expected")
    return int(count)


def _check_weights(gguf: Gguf, checkpoint: Checkpoint) -> list[str]:
    """No block may hold fewer weights than it has in the checkpoint: tensors may be joined, split or turned, not lost."""
    found = [0] * checkpoint.depth
    for name, tensor in gguf.tensors.items():
        number = _block_of(name)
        if number is not None and number < checkpoint.depth:
            found[number] += tensor.numel
    notes: list[str] = []
    for number, (have, expected) in enumerate(zip(found, checkpoint.block_parameters(), strict=True)):
        if have < expected:
            raise _differs(checkpoint, f"block {number} has {have} weights, {expected} were expected")
        if have > expected and not notes:
            notes.append(f"block {number} holds {have - expected} more weights than in the checkpoint")
    return notes


def _check_shapes(gguf: Gguf, checkpoint: Checkpoint) -> None:
    """Shapes of the tensors whose names are known in both; embedding and head."""
    anatomy = checkpoint.anatomy
    pairs = [(anatomy.embedding, "token_embd.weight")]
    if not checkpoint.tied and anatomy.head:
        pairs.append((anatomy.head, "output.weight"))
    for position in range(checkpoint.depth):
        pairs += [
            (anatomy.block_name(position, f"{ours}.weight"), f"blk.{position}.{theirs}.weight")
            for ours, theirs in _SAME.items()
        ]
    for ours, theirs in pairs:
        tensor, converted = checkpoint.tensors.get(ours), gguf.tensors.get(theirs)
        if tensor is None:
            continue  # another family's name, or packed
        if converted is None and theirs in ("token_embd.weight", "output.weight"):
            raise _differs(checkpoint, f"{theirs} is missing")
        if converted is not None and converted.shape != tensor.shape:
            raise _differs(
                checkpoint, f"{theirs} has shape {list(converted.shape)}, {list(tensor.shape)} was expected ({ours})"
            )


def _check_order(gguf: Gguf, checkpoint: Checkpoint) -> None:
    """Every block is at its place: its first norm has the values that it has in the checkpoint, or these plus one."""
    import numpy as np

    for position in range(checkpoint.depth):
        tensor = checkpoint.tensors.get(checkpoint.anatomy.block_name(position, _NORM))
        name = f"blk.{position}.{_SAME['input_layernorm']}.weight"
        if tensor is None or name not in gguf.tensors or tensor.dtype not in ("F32", "F16", "BF16"):
            continue
        theirs, ours = gguf.values(name), _values(tensor)
        # Gemma and others multiply by one plus the weight; the file holds the sum.
        if not any(np.allclose(theirs, ours + plus, rtol=1e-2, atol=1e-6) for plus in (0, 1)):
            raise _differs(checkpoint, f"block {position} holds the weights of another block ({name} differs)")


def _check_lists(gguf: Gguf, checkpoint: Checkpoint, depth: int) -> None:
    """Where blocks are of several kinds (sliding windows, say), the file says which is which, or llama.cpp's rule does.

    A checkpoint lists kinds by block. Some architectures of llama.cpp read such a list, others have a fixed pattern, which
    blocks that were taken out of the middle do not follow.
    """
    family, text = checkpoint.anatomy.family, checkpoint.anatomy.family.text(checkpoint.config)
    lists = checkpoint.per_block_lists
    rule: Mapping[str, Any] = {}
    if family.implied is not None:
        rule = family.implied({key: value for key, value in text.items() if key not in lists}, checkpoint.depth)
    stated = [value for value in gguf.metadata.values() if isinstance(value, list) and len(value) == depth]
    pruned = checkpoint.original_blocks != tuple(range(checkpoint.depth))
    for name, values in lists.items():
        kinds = [json_text(value) for value in values]
        by_rule = [json_text(value) for value in rule[name]] if name in rule else None
        fits = kinds == by_rule or (by_rule is None and not pruned)
        if len(set(kinds)) == 1 or fits or any(_same_kinds(kinds, one[: len(kinds)]) for one in stated):
            continue
        raise ShortstackError(
            f"{checkpoint.source}: its blocks are not all alike ({name}), and its GGUF file does not record which is which: "
            "llama.cpp would use the pattern of the dense model",
            hint="remove whole periods of the pattern, or serve it with transformers or vLLM",
        )


def _same_kinds(kinds: list[str], stated: list[Any]) -> bool:
    """Whether two lists tell blocks apart in the same way."""
    pairs = set(zip(kinds, map(str, stated), strict=True))
    return len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs})


def _check_tokens(gguf: Gguf, checkpoint: Checkpoint) -> list[str]:
    """One token per row of the embedding, and those of tokenizer.json at their numbers."""
    if gguf.metadata.get("tokenizer.ggml.model") in (None, "none"):
        raise _differs(checkpoint, "it has no tokenizer")
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    rows = checkpoint.embedding_rows
    if not isinstance(tokens, list) or len(tokens) != rows:
        count = len(tokens) if isinstance(tokens, list) else 0
        raise _differs(checkpoint, f"its tokenizer has {count} tokens, the embedding has {rows} rows")
    path = checkpoint.directory / "tokenizer.json"
    expected = _plain_tokens(path) if path.is_file() else {}
    if not expected:
        return ["tokens were counted, not compared: there is no tokenizer.json to compare them with"]
    for number, token in expected.items():
        if number >= rows or tokens[number] != token:
            found = "missing" if number >= rows else json_text(tokens[number])
            raise _differs(checkpoint, f"token {number} is {found}, {json_text(token)} was expected")
    return []


def _plain_tokens(path: Path) -> dict[int, str]:
    """Tokens by number, without the added ones, which the converter may spell in another way; empty where they cannot be
    read.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        record: Any = read_json(path.read_bytes())
        vocabulary = record["model"]["vocab"]
        if isinstance(vocabulary, list):  # pieces with their scores
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        added = {int(one["id"]) for one in record.get("added_tokens", [])}
        return {int(number): token for token, number in vocabulary.items() if int(number) not in added}
    return {}


def _check_numbers(gguf: Gguf, checkpoint: Checkpoint, advance: Callable[[int], object]) -> list[str]:
    """Every stored number is finite: float16 cannot hold what float32 and bfloat16 can."""
    import numpy as np

    unread = 0
    for name in gguf.tensors:
        nbytes = gguf.nbytes(name)
        if nbytes is None:
            unread += 1
            continue
        if not np.isfinite(gguf.values(name)).all():
            raise _differs(
                checkpoint, f"{name} holds numbers that are not finite", "--type bf16 or f32 holds larger ones than f16"
            )
        advance(nbytes)
    return [f"{unread} tensors are of types that are not read here"] if unread else []


def _block_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if len(parts) > 2 and parts[0] == "blk" and parts[1].isdigit() else None


def _values(tensor: TensorInfo) -> Any:
    """A small tensor of the checkpoint as float32."""
    raw = bytearray(tensor.nbytes)
    descriptor = os.open(tensor.file, os.O_RDONLY)
    try:
        read_exactly(descriptor, memoryview(raw), tensor.start, tensor.file)
    finally:
        os.close(descriptor)
    return read_plain(tensor.dtype, raw).reshape(tensor.shape)
