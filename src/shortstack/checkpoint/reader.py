"""Open a checkpoint: its config, its tensor index, the bytes of a tensor. No tensor is loaded to answer a question."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from shortstack.checkpoint import anatomy as anatomies
from shortstack.checkpoint import provenance
from shortstack.checkpoint.anatomy import Anatomy
from shortstack.checkpoint.safetensors_header import FLOAT_DTYPES, TensorInfo, read_exactly, read_header
from shortstack.errors import ShortstackError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CONFIG_LIMIT = 10_000_000  # bytes
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_FINGERPRINT_EDGE = 4096  # bytes of the start and of the end of each tensor


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory, opened: headers and config checked, no tensor read.

    Attributes:
        directory: where it lies.
        source: what the user called it (a path, a hub id, `embedded`).
        config: config.json as it stands.
        config_bytes: the same, as bytes.
        tensors: by name, in the order of files and bytes.
        shards: the weight files and their metadata, in order.
        anatomy: where the blocks are.
        original_blocks: for each block here, its index in the original model (identity unless blocks were removed).
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

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.anatomy.depth

    @property
    def tied(self) -> bool:
        """Whether output head and token embedding are one tensor."""
        return anatomies.is_tied(self.config, self.anatomy.family)

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
        return tuple(t for t in self.tensors.values() if self.anatomy.block_of(t.name) is None)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def parameters(self, tensors: Iterable[TensorInfo] | None = None) -> int:
        """Number of parameters of some tensors, or of all: masks and a head stored twice are not counted."""
        chosen = self.tensors.values() if tensors is None else tensors
        return sum(t.numel for t in chosen if not self.anatomy.is_buffer(t.name) and not self._is_repeated_head(t.name))

    def block_parameters(self) -> list[int]:
        """Number of parameters of each block."""
        return [self.parameters(block) for block in self.blocks]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the config and, per tensor in name order, name, dtype, shape and the bytes at both ends."""
        digest = hashlib.sha256(self.config_bytes)
        descriptors = {path: os.open(path, os.O_RDONLY) for path in self.shards}
        try:
            for name in sorted(self.tensors):
                tensor = self.tensors[name]
                digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
                edge = min(_FINGERPRINT_EDGE, tensor.nbytes)
                for start in (tensor.start, tensor.start + tensor.nbytes - edge):
                    edge_bytes = bytearray(edge)
                    read_exactly(descriptors[tensor.file], memoryview(edge_bytes), start, tensor.file)
                    digest.update(edge_bytes)
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)
        return digest.hexdigest()

    def position_of(self, original_block: int) -> int:
        """Where a block of the original model stands in this checkpoint.

        Raises:
            ShortstackError: no such block, or it was removed before.
        """
        if original_block in self.original_blocks:
            return self.original_blocks.index(original_block)
        has = f"it has blocks {anatomies.ranges(self.original_blocks)}"
        raise ShortstackError(f"{self.source}: no block {original_block}; {has} (numbers of the original model)")

    def _is_repeated_head(self, name: str) -> bool:
        return self.tied and name == self.anatomy.head and self.anatomy.embedding in self.tensors


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a checkpoint by directory, hub id, or `embedded` (the small model in the package).

    Raises:
        ShortstackError: nothing is there, it is not a checkpoint that can be read, or config and tensors disagree.
    """
    source = str(model)
    directory = locate(source)
    config, config_bytes = read_config(directory)
    anatomies.family_of(config, source)  # before the weights: an unknown family need not have been downloaded whole
    tensors, shards = _read_weights(directory)
    anatomy = anatomies.anatomy_of(config, tensors, source)
    record = provenance.read(directory)
    original = tuple(record["kept_blocks"]) if record else tuple(range(anatomy.depth))
    if len(original) != anatomy.depth:
        raise ShortstackError(
            f"{directory / provenance.FILE_NAME}: lists {len(original)} kept blocks, the checkpoint has {anatomy.depth}",
            hint="the file does not belong to this checkpoint; remove it to number blocks as they stand",
        )
    checkpoint = Checkpoint(
        directory, source, config, config_bytes, tensors, shards, anatomy, original, provenance=record
    )
    _check_consistency(checkpoint)
    return checkpoint


def locate(source: str) -> Path:
    """The directory that a MODEL argument means; a hub id is downloaded (or found in the hub cache)."""
    if source == "embedded":
        from shortstack.embedded import MODEL_DIRECTORY

        return MODEL_DIRECTORY
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ShortstackError(f"{source}: is a file, expected a checkpoint directory or a hub id")
    if not _HUB_ID.fullmatch(source) or source.count("/") > 1:
        raise ShortstackError(f"{source}: no such directory", hint="give a checkpoint directory, a hub id, or embedded")
    return _download(source)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    missing = f"{hub_id}: no such directory, and"
    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
        )
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        raise ShortstackError(
            f"{missing} the hub refused it (HTTP {status})", hint="check the id, or your token"
        ) from None
    except (LocalEntryNotFoundError, OSError) as error:
        reason = type(error).__name__
        raise ShortstackError(
            f"{missing} the hub could not be reached and its cache does not hold it ({reason})",
            hint="check the path, or the network (HF_HUB_OFFLINE?)",
        ) from None


def read_config(directory: Path) -> tuple[dict[str, Any], bytes]:
    """config.json, parsed and as bytes."""
    path = directory / "config.json"
    if not path.is_file():
        hint = "give the directory that holds config.json and model.safetensors"
        raise ShortstackError(f"{directory}: not a checkpoint (no config.json)", hint=hint)
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


def _read_weights(directory: Path) -> tuple[dict[str, TensorInfo], dict[Path, dict[str, str]]]:
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file() and index.is_file():
        raise ShortstackError(
            f"{directory}: holds both {SINGLE} and {INDEX}; which one counts is ambiguous",
            hint="remove the one that does not belong to this checkpoint",
        )
    if single.is_file():
        return _index_tensors([single])
    if not index.is_file():
        pickled = sorted(directory.glob("*.bin"))
        if pickled:
            raise ShortstackError(
                f"{directory}: holds pickled weights ({pickled[0].name}), which shortstack does not read",
                hint="convert it: load it with transformers and save_pretrained() it to a new directory",
            )
        raise ShortstackError(f"{directory}: no weights ({SINGLE} or {INDEX})", hint="download incomplete?")
    weight_map = _weight_map(index)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        listed = ", ".join(missing)
        raise ShortstackError(f"{directory}: shard missing: {listed} (named by {INDEX})", hint="download it again")
    tensors, shards = _index_tensors([directory / name for name in names])
    for name, shard in weight_map.items():
        if name not in tensors:
            raise ShortstackError(f"{index}: names {name!r} in {shard}, but no shard holds it")
        if tensors[name].file.name != shard:
            raise ShortstackError(f"{index}: says {name!r} is in {shard}, but it is in {tensors[name].file.name}")
    unlisted = sorted(set(tensors) - set(weight_map))
    if unlisted:
        raise ShortstackError(
            f"{index}: does not name {unlisted[0]!r} ({len(unlisted)} tensors), which the shards hold"
        )
    return tensors, shards


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise ShortstackError(f"{index}: not a weight index (no weight_map)", hint="download it again") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ShortstackError(f"{index}: weight_map is empty or not an object")
    for shard in weight_map.values():
        if not isinstance(shard, str) or shard in ("", ".", "..") or Path(shard).name != shard:
            raise ShortstackError(f"{index}: shard {shard!r} must be a plain file name in the same directory")
    return weight_map


def _index_tensors(paths: list[Path]) -> tuple[dict[str, TensorInfo], dict[Path, dict[str, str]]]:
    tensors: dict[str, TensorInfo] = {}
    shards = {}
    for path in paths:
        listed, shards[path] = read_header(path)
        for tensor in listed:
            if tensor.name in tensors:
                raise ShortstackError(f"{path}: tensor {tensor.name!r} is also in {tensors[tensor.name].file.name}")
            tensors[tensor.name] = tensor
    return tensors, shards


def _check_consistency(checkpoint: Checkpoint) -> None:
    """What transformers would load without a word: a random head, integer weights, blocks of the wrong width."""
    source, config, anatomy = checkpoint.source, checkpoint.config, checkpoint.anatomy
    anatomies.per_block_lists(config, anatomy.family, anatomy.depth, source)
    for tensor in checkpoint.tensors.values():
        if tensor.dtype not in FLOAT_DTYPES and tensor.name.endswith("weight") and "quantization_config" not in config:
            raise ShortstackError(f"{source}: {tensor.name} is {tensor.dtype}, expected floating-point weights")
    embedding = checkpoint.tensors.get(anatomy.embedding)
    if embedding is None:
        raise ShortstackError(f"{source}: the weights lack {anatomy.embedding}, the token embedding")
    if not checkpoint.tied and anatomy.head not in checkpoint.tensors:
        raise ShortstackError(
            f"{source}: config.json says head and embedding are not tied, but the weights lack {anatomy.head}",
            hint='the head would be random; set "tie_word_embeddings": true if they are one tensor',
        )
    if checkpoint.tied and anatomy.head in checkpoint.tensors:
        head = checkpoint.tensors[anatomy.head]
        if head.shape != embedding.shape or not _same_bytes(head, embedding):
            raise ShortstackError(
                f"{source}: config.json says head and embedding are tied, but {anatomy.head} differs from the embedding",
                hint='set "tie_word_embeddings": false if the head is a tensor of its own',
            )
    hidden = config.get("word_embed_proj_dim", config.get("hidden_size", config.get("n_embd")))
    vocabulary = config.get("vocab_size", embedding.shape[0])
    if isinstance(hidden, int) and tuple(embedding.shape) != (vocabulary, hidden):
        raise ShortstackError(
            f"{source}: {anatomy.embedding} is {list(embedding.shape)}, config.json says [{vocabulary}, {hidden}]",
            hint="config.json and the weights do not belong together",
        )


def _same_bytes(first: TensorInfo, second: TensorInfo) -> bool:
    pairs = zip(tensor_chunks(first), tensor_chunks(second), strict=False)
    return first.nbytes == second.nbytes and all(a == b for a, b in pairs)


def tensor_chunks(tensor: TensorInfo, size: int = 1 << 20) -> Iterator[bytes]:
    """The bytes of one tensor, piece by piece."""
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        left = tensor.nbytes
        while left:
            piece = stream.read(min(size, left))
            if not piece:
                raise ShortstackError(f"{tensor.file}: ended inside {tensor.name!r}; it was changed while it was read")
            left -= len(piece)
            yield piece
