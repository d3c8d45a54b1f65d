"""What a teacher wrote down, as a student reads it.

Legend: N predicted tokens, K top tokens, B rows, T tokens of a row.
"""

from __future__ import annotations

import collections
import hashlib
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shortstack.artifacts.provenance import FILE_NAME
from shortstack.common.json_text import json_text, read_json
from shortstack.errors import ShortstackError, first_line

if TYPE_CHECKING:
    from shortstack.data.collators import Batch
    from shortstack.data.loaders import ExampleDataset
    from shortstack.retraining.options import Hyperparameters

KIND = "teaching"
_SHARDS_HELD = 16


@dataclass(frozen=True)
class TeacherCache:
    """A folder that `teach` wrote.

    Attributes:
        record: its manifest.
    """

    folder: Path
    record: dict[str, Any] = field(repr=False)

    def rows(self, part: str) -> TaughtRows:
        """The rows of one part."""
        return TaughtRows(self.folder, {n: s for n, s in self.record["shards"].items() if n.startswith(part)})


def open_teacher_cache(folder: Path) -> TeacherCache:
    """Open what `teach` wrote.

    Raises:
        ShortstackError: it is something else, or a shard is missing or has another size than when it was written.
    """
    try:
        record = read_json((folder / FILE_NAME).read_bytes())
    except (OSError, ValueError):
        record = {}
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise ShortstackError(
            f"{folder}: was not written by shortstack teach", hint="shortstack teach TEACHER --out DIR"
        )
    for name, shard in record["shards"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            raise ShortstackError(f"{path}: is missing or incomplete", hint="run shortstack teach again")
    return TeacherCache(folder, record)


class TaughtRows(Sequence[dict[str, np.ndarray]]):
    """Rows of some shards, read when they are requested; the shards that were used last are held."""

    def __init__(self, folder: Path, shards: dict[str, Any]) -> None:
        self.folder, self.names = folder, sorted(shards)
        self._sha256 = [str(shards[name]["sha256"]) for name in self.names]
        self.files = [shards[name]["rows"] for name in self.names]
        self.lengths: list[int] = []
        self._held: collections.OrderedDict[int, list[dict[str, np.ndarray]]] = collections.OrderedDict()
        for number in range(len(self.names)):
            with self._opened(number) as arrays:
                self.lengths += arrays["lengths"].tolist()

    def __len__(self) -> int:
        return sum(self.files)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        file = 0
        while place >= self.files[file]:
            place -= self.files[file]
            file += 1
        if file not in self._held:
            self._held[file] = self._read(file)
            while len(self._held) > _SHARDS_HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(file)
        return self._held[file][place]

    def _opened(self, number: int, *, whole: bool = False) -> Any:
        """The arrays of a shard; `whole` reads all of it, and compares its hash with the recorded one."""
        path = self.folder / self.names[number]
        try:
            data = path.read_bytes() if whole else b""
            if whole and hashlib.sha256(data).hexdigest() != self._sha256[number]:
                raise ShortstackError(
                    f"{path}: is not the shard that {FILE_NAME} records", hint="run shortstack teach again"
                )
            return np.load(io.BytesIO(data) if whole else path, allow_pickle=False)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ShortstackError(
                f"{path}: cannot be read ({first_line(error)})", hint="run shortstack teach again"
            ) from None

    def _read(self, number: int) -> list[dict[str, np.ndarray]]:
        with self._opened(number, whole=True) as arrays:
            planes = arrays["top_logprobs"]
            top_logprobs_NK = np.ascontiguousarray(planes.transpose(1, 2, 0)).view(np.float16)[:, :, 0].T
            top_ids_NK = arrays["top_ids"].T
            token_ends, row_ends = np.cumsum(arrays["lengths"]), np.cumsum(arrays["predicted"])
            rows = []
            for row, (end, predicted_end) in enumerate(zip(token_ends, row_ends, strict=True)):
                tokens = slice(end - arrays["lengths"][row], end)
                predicted = slice(predicted_end - arrays["predicted"][row], predicted_end)
                rows.append(
                    {key: arrays[key][tokens] for key in ("ids", "targets", "positions")}
                    | {"top_ids": top_ids_NK[predicted], "top_logprobs": top_logprobs_NK[predicted]}
                )
        return rows


def cached_batch(rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    """Rows side by side, padded on the left; `top_ids` and `top_logprobs` are [B, T, K], zero where nothing is predicted."""
    import torch

    from shortstack.data.collators import padded
    from shortstack.data.instructions import IGNORED

    longest, top_k = max(len(row["ids"]) for row in rows), rows[0]["top_ids"].shape[1]
    targets_BT = padded([row["targets"] for row in rows], IGNORED)
    batch: Batch = {
        "input_ids": padded([row["ids"] for row in rows], 0),
        "position_ids": padded([row["positions"] for row in rows], 0),
        "targets": targets_BT,
        "top_ids": torch.zeros((len(rows), longest, top_k), dtype=torch.int32),
        "top_logprobs": torch.zeros((len(rows), longest, top_k), dtype=torch.float16),
    }
    for number, row in enumerate(rows):
        chosen = targets_BT[number] != IGNORED
        batch["top_ids"][number, chosen] = torch.from_numpy(row["top_ids"].astype(np.int32))
        batch["top_logprobs"][number, chosen] = torch.from_numpy(np.ascontiguousarray(row["top_logprobs"]))
    mask_BT = padded([[1] * len(row["ids"]) for row in rows], 0)
    # Windows of one length are packed: their positions keep documents apart, and a mask would undo that.
    return batch if bool(mask_BT.all()) else {**batch, "attention_mask": mask_BT}


def cached_dataset(cache: TeacherCache, hyperparameters: Hyperparameters, seed: int) -> ExampleDataset:
    """The cached logits, as data to train on."""
    from shortstack.data.loaders import ExampleDataset, in_batches

    rows = cache.rows("train")
    if not len(rows):
        raise ShortstackError(f"{cache.folder}: has no data to train on", hint="run shortstack teach with more data")
    digest = hashlib.sha256(json_text(cache.record["shards"], sort_keys=True).encode()).hexdigest()
    validation = in_batches(cache.rows("held_out"), cached_batch)
    return ExampleDataset(
        rows,
        rows.lengths,
        cached_batch,
        validation,
        {"source": str(cache.folder), "sha256": digest, "rows": len(rows), "taught": cache.record["data"]},
        seed,
        hyperparameters.group_by_length,
        rows.files,
    )
