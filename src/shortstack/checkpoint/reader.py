"""Open a checkpoint: its config, its tensor index, the bytes of a tensor. No tensor is loaded to answer a question."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from shortstack.artifacts import provenance
from shortstack.checkpoint import anatomy as structure
from shortstack.checkpoint.anatomy import Anatomy, Family
from shortstack.checkpoint.byte_copy import TensorCopy, same_bytes
from shortstack.checkpoint.config_file import Repair, repair_for
from shortstack.checkpoint.headers import (
    FLOAT_DTYPES,
    TensorInfo,
    adapter_files,
    checked_link,
    has_weights,
    read_exactly,
    read_weights,
    stray_shards,
)
from shortstack.checkpoint.hub import locate, remote_headers
from shortstack.checkpoint.packed import weights_in
from shortstack.checkpoint.tokenizer_files import ChosenTokenizer
from shortstack.common.formatting import ranges
from shortstack.common.json_text import json_text
from shortstack.errors import ShortstackError

_CONFIG_LIMIT = 10_000_000  # bytes
_FINGERPRINT_EDGE = 4096  # bytes of the start and of the end of each tensor


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory. Headers and config were read and checked; no tensor was read.

    Attributes:
        directory: The directory that holds the checkpoint.
        source: The checkpoint, as it was named in the call: a path, a hub id, or `embedded`.
        config: The content of config.json.
        config_bytes: The bytes of config.json.
        tensors: The description of each tensor by its name, in the order of files and of positions in them.
        shards: The weight files in order, each with its metadata.
        anatomy: The names of the modules and tensors of the family, such as those of the blocks.
        original_blocks: The number of each block in the original model. Without removed blocks it is 0, 1, 2, ...
        provenance: The content of shortstack.json; None if shortstack did not write the checkpoint.
        notes: What a user should know about the checkpoint, one line each.
        is_here: Whether the weights are local. For a hub id, possibly only headers were read.
        allow_links: Whether files may be symbolic links that lead out of the directory.
        tokenizer: The tokenizer that is used instead of the checkpoint's own; None for its own.
    """

    directory: Path
    source: str
    config: dict[str, Any]
    config_bytes: bytes
    tensors: dict[str, TensorInfo]
    shards: dict[Path, dict[str, str]]
    anatomy: Anatomy
    original_blocks: tuple[int, ...]
    provenance: dict[str, Any] | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()
    is_here: bool = True
    allow_links: bool = False
    tokenizer: ChosenTokenizer | None = None

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return self.anatomy.depth

    @property
    def tied(self) -> bool:
        """Whether the output head and the token embedding are one tensor."""
        return structure.is_tied(self.config, self.anatomy.family)

    @property
    def revision(self) -> str:
        """The commit on the hub, if the directory is in the hub cache; else empty."""
        return self.directory.name if self.directory.parent.name == "snapshots" else ""

    @property
    def hub_id(self) -> str:
        """The id on the hub, if the directory is in the hub cache; else empty."""
        folder = self.directory.parent.parent.name
        return (
            folder.removeprefix("models--").replace("--", "/")
            if self.revision and folder.startswith("models--")
            else ""
        )

    @cached_property
    def repair(self) -> Repair | None:
        """What is known to be wrong with its config, and right."""
        return repair_for(self.config, self.directory)

    @cached_property
    def blocks(self) -> tuple[tuple[TensorInfo, ...], ...]:
        """The tensors of each block."""
        result: list[list[TensorInfo]] = [[] for _ in range(self.depth)]
        for tensor in self.tensors.values():
            index = self.anatomy.block_of(tensor.name)
            if index is not None:
                result[index].append(tensor)
        return tuple(tuple(block) for block in result)

    @cached_property
    def outside_blocks(self) -> tuple[TensorInfo, ...]:
        """Embeddings, final norm, head: everything that pruning keeps."""
        block_of, further = self.anatomy.block_of, self.anatomy.predicts_further
        return tuple(t for t in self.tensors.values() if block_of(t.name) is None and not further(t.name))

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def parameters(self, tensors: Iterable[TensorInfo] | None = None) -> int:
        """The number of parameters of these tensors, or of all.

        A quantized tensor counts as the weights that it represents. Not counted are masks, an output head that is
        stored twice, and blocks for multi-token prediction, which transformers does not load.
        """
        chosen = self.tensors.values() if tensors is None else tensors
        quantization = self.config.get("quantization_config")
        return sum(weights_in(t, quantization) for t in chosen if self.is_parameter(t.name))

    def block_parameters(self) -> list[int]:
        """The number of parameters of each block."""
        return [self.parameters(block) for block in self.blocks]

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the config and of each tensor's name, dtype, shape, first bytes and last bytes."""
        digest = hashlib.sha256(self.config_bytes)
        descriptors = {path: os.open(path, os.O_RDONLY) for path in self.shards}
        try:
            for name in sorted(self.tensors):
                tensor = self.tensors[name]
                digest.update(json_text([name, tensor.dtype, tensor.shape]).encode())
                edge = min(_FINGERPRINT_EDGE, tensor.nbytes)
                for start in (tensor.start, tensor.start + tensor.nbytes - edge):
                    edge_bytes = bytearray(edge)
                    read_exactly(descriptors[tensor.file], memoryview(edge_bytes), start, tensor.file)
                    digest.update(edge_bytes)
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)
        return digest.hexdigest()

    @property
    def positions(self) -> int | None:
        """The longest sequence in tokens that the model accepts; None if the config does not limit it."""
        return structure.max_positions(self.config, self.anatomy.family)

    @property
    def embedding_rows(self) -> int:
        """The number of rows of the token embedding. Token ids are below it."""
        return self.tensors[self.anatomy.embedding].shape[0]

    def kv_bytes_per_token(self, depth: int | None = None) -> int | None:
        """The size of the key-value cache in bytes per token in 16 bits, for `depth` blocks; None if it is unknown."""
        text = self.anatomy.family.text(self.config)
        return structure.kv_bytes_per_token(text, self.depth if depth is None else depth)

    def too_long(self, prompt_tokens: int, new_tokens: int) -> str | None:
        """An error message if a prompt and its continuation need more positions than the model has; else None."""
        if self.positions is None or prompt_tokens + new_tokens <= self.positions:
            return None
        return f"{self.source}: {prompt_tokens} prompt tokens and {new_tokens} new ones, but {self.positions} positions"

    def position_of(self, original_block: int) -> int:
        """The position in this checkpoint of a block of the original model.

        Raises:
            ShortstackError: the checkpoint has no such block.
        """
        if original_block in self.original_blocks:
            return self.original_blocks.index(original_block)
        has = f"it has blocks {ranges(self.original_blocks)}"
        raise ShortstackError(f"{self.source}: no block {original_block}; {has} (numbers of the original model)")

    @cached_property
    def per_block_lists(self) -> dict[str, list[Any]]:
        """Every config entry with one value per block, written out in full."""
        return structure.per_block_lists(self.config, self.anatomy.family, self.depth, self.source)

    @property
    def text_config(self) -> dict[str, Any]:
        """The config of the language model, with every per-block list written out."""
        return {**self.anatomy.family.text(self.config), **self.per_block_lists}

    def is_repeated_head(self, name: str) -> bool:
        """Whether a tensor is an output head that is stored although it is tied to the embedding."""
        return self.tied and name == self.anatomy.head and self.anatomy.embedding in self.tensors

    def is_parameter(self, name: str) -> bool:
        """Whether a tensor counts among the model's parameters."""
        return not (self.anatomy.is_buffer(name) or self.is_repeated_head(name) or self.anatomy.predicts_further(name))


def read_checkpoint(
    model: str | Path,
    family_of: Callable[[dict[str, Any], str], Family],
    *,
    allow_links: bool = False,
    headers_only: bool = False,
) -> Checkpoint:
    """Open a checkpoint by directory, hub id, or `embedded` (the small model in the package).

    Args:
        model: which.
        family_of: gives the row of a config's family; the second argument is what errors name.
        allow_links: follow links that lead out of the directory.
        headers_only: of a hub id that is not in the cache, read the headers on the hub and download no weights.

    Raises:
        ShortstackError: nothing is there, it is not a checkpoint that can be read, or config and tensors disagree.
    """
    source = str(model)

    def row(directory: Path) -> Family:
        return family_of(read_config(directory, allow_links=allow_links)[0], source)

    directory = locate(source, before_weights=row, weights=not headers_only)
    config, config_bytes = read_config(directory, allow_links=allow_links)
    chosen = row(directory)
    is_here = not headers_only or has_weights(directory)
    tensors, shards = read_weights(directory, allow_links=allow_links) if is_here else remote_headers(source, directory)
    anatomy = structure.anatomy_of(config, chosen, tensors, source)
    record = provenance.read(directory)
    original = tuple(record["kept_blocks"]) if record else tuple(range(anatomy.depth))
    if len(original) != anatomy.depth:
        raise ShortstackError(
            f"{directory / provenance.FILE_NAME}: lists {len(original)} kept blocks, the checkpoint has {anatomy.depth}",
            hint="the file belongs to another checkpoint; remove it, and blocks are numbered as they are here",
        )
    stray = stray_shards(directory, set(shards))
    beside = adapter_files(directory)
    notes = (
        *([f"warning: {directory}: {', '.join(stray)} is not in the index and is ignored"] if stray else []),
        *([f"{directory}: an adapter beside the model's weights is ignored ({', '.join(beside)})"] if beside else []),
    )
    checkpoint = Checkpoint(
        directory, source, config, config_bytes, tensors, shards, anatomy, original, record, notes, is_here,
        allow_links,
    )  # fmt: skip
    check_consistency(checkpoint)
    return checkpoint


def read_config(directory: Path, *, allow_links: bool = False) -> tuple[dict[str, Any], bytes]:
    """config.json, parsed and as bytes.

    Raises:
        ShortstackError: it is not there, a link that leads out of the directory (unless `allow_links`), or not JSON.
    """
    path = directory / "config.json"
    if not path.is_file():
        if (directory / "adapter_config.json").is_file():
            raise ShortstackError(
                f"{directory}: is an adapter (adapter_config.json), not a checkpoint",
                hint=f"merge it into its base model first: shortstack merge {directory} --out MERGED",
            )
        hint = "give the directory that holds config.json and model.safetensors"
        raise ShortstackError(f"{directory}: not a checkpoint (no config.json)", hint=hint)
    checked_link(path, directory, allow_links)
    if path.stat().st_size > _CONFIG_LIMIT:
        raise ShortstackError(f"{path}: {path.stat().st_size} bytes; a config has at most {_CONFIG_LIMIT}")
    raw = path.read_bytes()
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ShortstackError(f"{path}: not valid JSON: {error}", hint="download the file again") from None
    if not isinstance(config, dict):
        raise ShortstackError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config, raw


def check_consistency(checkpoint: Checkpoint) -> None:
    """Refuse what transformers would load without a word: a random head, integer weights, the wrong width.

    Raises:
        ShortstackError: one of these.
    """
    source, config, anatomy = checkpoint.source, checkpoint.config, checkpoint.anatomy
    _ = checkpoint.per_block_lists  # of the model's depth, or an error
    if "quantization_config" not in config:
        for tensor in checkpoint.tensors.values():
            if tensor.dtype not in FLOAT_DTYPES and tensor.name.endswith("weight"):
                raise ShortstackError(
                    f"{source}: {tensor.name} is {tensor.dtype}, expected floating-point weights",
                    hint="if the checkpoint is quantized, config.json must have a quantization_config",
                )
    embedding = checkpoint.tensors.get(anatomy.embedding)
    if embedding is None:
        raise ShortstackError(
            f"{source}: the weights lack {anatomy.embedding}, the token embedding", hint="download the checkpoint again"
        )
    _check_head(checkpoint, embedding)
    _check_width(checkpoint, embedding)


def _check_head(checkpoint: Checkpoint, embedding: TensorInfo) -> None:
    source, anatomy = checkpoint.source, checkpoint.anatomy
    head = checkpoint.tensors.get(anatomy.head)
    if not checkpoint.tied and head is None:
        raise ShortstackError(
            f"{source}: config.json says head and embedding are not tied, but the weights lack {anatomy.head}",
            hint='the head would be random; set "tie_word_embeddings": true if they are one tensor',
        )
    if not checkpoint.tied or head is None:
        return
    pair = TensorCopy(head, anatomy.head), TensorCopy(embedding, anatomy.embedding)
    if head.shape != embedding.shape or (checkpoint.is_here and not same_bytes(*pair)):
        raise ShortstackError(
            f"{source}: config.json says head and embedding are tied, but {anatomy.head} differs from the embedding",
            hint='set "tie_word_embeddings": false if the head is a tensor of its own',
        )


# Config entries that hold the width of the embedding, the first one that is there.
_WIDTHS = ("word_embed_proj_dim", "embedding_size", "input_embedding_size", "hidden_size", "n_embd", "d_model")


def _check_width(checkpoint: Checkpoint, embedding: TensorInfo) -> None:
    """The embedding's shape, and that blocks that are alike have tensors that are alike."""
    source, family = checkpoint.source, checkpoint.anatomy.family
    text = family.text(checkpoint.config)
    hidden = next((text[key] for key in _WIDTHS if isinstance(text.get(key), int)), None)
    vocabulary = text.get("vocab_size", checkpoint.config.get("vocab_size"))
    if isinstance(vocabulary, int) and family.embedding_rows is not None:
        vocabulary += family.embedding_rows(text)
    expected = [vocabulary if isinstance(vocabulary, int) else None, hidden]
    found = list(embedding.shape)
    if len(found) != 2 or any(want is not None and have != want for want, have in zip(expected, found, strict=True)):
        raise ShortstackError(
            f"{source}: {embedding.name} is {found}, config.json says {expected}",
            hint="config.json and the weights do not belong together",
        )
