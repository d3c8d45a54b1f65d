"""A teacher's top logits, computed once and written down: a student learns from them without the teacher.

The folder holds what the student is trained on, too (tokens, targets, positions), so that nothing can fall apart: the
student needs neither the data nor a tokenizer. Shards are compressed; a killed run resumes with the next one.

Legend: N predicted tokens, K top tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shortstack.artifacts.provenance import FILE_NAME, versions
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.clock import command_seconds
from shortstack.common.formatting import count, seconds, size
from shortstack.common.options import stage
from shortstack.common.progress import Progress
from shortstack.common.shown import Shown
from shortstack.data.tokenizer import load_tokenizer
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_model
from shortstack.retraining.options import TeachOptions
from shortstack.retraining.teacher_cache import KIND
from shortstack.runtime.atomic_output import check_output, published, write_json
from shortstack.runtime.workspace import load_state, save_state, unused, workspace

if TYPE_CHECKING:
    import torch

    from shortstack.data.collators import Batch
    from shortstack.retraining.teacher import Teacher

_DEFAULTS = TeachOptions()
_ROWS_PER_SHARD = 64
_STATE = "state.json"
_PARTS = ("train", "held_out")


@dataclass(frozen=True, repr=False)
class TeachResult(Shown):
    """The folder of cached logits that was written.

    Attributes:
        out: The folder.
        rows: The number of windows, or of rows of instructions.
        tokens: The number of predicted tokens in them.
        nbytes: The size of all files in bytes.
        mass: The mean share of the probability that the cached tokens hold, from 0 to 1.
        seconds: The wall-clock time in seconds.
    """

    out: Path
    rows: int
    tokens: int
    nbytes: int
    mass: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {"schema": 1, **self.__dict__, "out": str(self.out)}

    def to_text(self) -> str:
        """What a person reads on the terminal."""
        return (
            f"{self.out}: {self.rows} rows, {count(self.tokens)} predicted tokens, {size(self.nbytes)} "
            f"({self.nbytes / max(1, self.tokens):.0f} bytes a token) in {seconds(self.seconds)}; "
            f"the top tokens hold {self.mass:.1%} of the probability"
        )


@stage
def teach(
    teacher: str,
    *,
    data: str,
    out: Path,
    options: TeachOptions = _DEFAULTS,
) -> TeachResult:
    """Cache a teacher's top logits on a text, for distillation without the teacher in memory.

    Source: knowledge distillation (Hinton et al. 2015, arXiv 1503.02531), with only the top logits.

    Args:
        teacher: The dense checkpoint: a directory, a hub id such as `org/name@revision`, or `embedded`.
        data: The data that the student will be trained on: text, or rows of instructions (only responses count in the
            loss).
        out: Write the logits to this folder.
        options: which logits are cached on which rows, and how the run computes.

    Returns:
        What was written.

    Raises:
        ShortstackError: the teacher or data cannot be used.
    """
    from shortstack.retraining.options import parse_tokens

    progress = Progress(quiet=options.quiet)
    if options.top_k < 1 or not options.temperature > 0:
        raise UsageError(
            f"--top-k {options.top_k} --temperature {options.temperature}: expected at least 1, and more than 0"
        )
    checkpoint = open_model(teacher, allow_links=options.allow_links, tokenizer=options.tokenizer, progress=progress)
    check_output(out, inputs=[checkpoint.directory], force=options.force)
    length = min(options.seq_len, checkpoint.positions or options.seq_len)
    if length < options.seq_len:
        progress.say(f"{checkpoint.source} has {length} positions: {options.seq_len} tokens are cut to {length}")
    settings = {
        "top_k": min(options.top_k, _vocabulary(checkpoint)), "temperature": options.temperature, "seq_len": length,
        "seed": options.seed, "validation": options.validation, "isolate_documents": options.isolate_documents,
        "tokens": parse_tokens(options.tokens), "micro_batch": options.micro_batch,
    }  # fmt: skip
    with workspace(out) as work:
        record = _TeacherRun(checkpoint, data, settings, work, progress, options).write()
        with published(out, inputs=[checkpoint.directory], force=options.force, is_locked=True) as folder:
            for name in record["shards"]:
                (work / name).rename(folder / name)
            record["files"] = {name: shard["sha256"] for name, shard in record["shards"].items()}
            write_json(folder / FILE_NAME, record)
    nbytes = sum(shard["bytes"] for shard in record["shards"].values())
    return TeachResult(Path(out), record["rows"], record["predicted"], nbytes, record["mass"], command_seconds())


def _vocabulary(checkpoint: Checkpoint) -> int:
    return checkpoint.tensors[checkpoint.anatomy.embedding].shape[0]


@dataclass
class _TeacherRun:
    """One run of the teacher over the data, shard after shard."""

    teacher: Checkpoint
    data: str
    settings: dict[str, Any]
    work: Path
    progress: Progress
    options: TeachOptions
    key: dict[str, Any] = field(default_factory=dict)

    def write(self) -> dict[str, Any]:
        """Write all shards into the work folder that are not there yet; the record of them all."""
        from shortstack.data.loaders import open_dataset
        from shortstack.retraining.teacher import opened_teacher

        tokenizer = load_tokenizer(self.teacher, trust_remote_code=self.options.trust_remote_code)
        settings = self.settings
        dataset = open_dataset(
            self.data,
            tokenizer,
            seq_len=settings["seq_len"],
            seed=settings["seed"],
            validation=settings["validation"],
            isolated=settings["isolate_documents"],
            group_by_length=False,
            progress=self.progress,
            embedding_rows=self.teacher.embedding_rows,
        )
        rows = dataset.steps(1, epochs=1, tokens=settings["tokens"])
        with opened_teacher(self.teacher, self.options, self.progress.say) as model:
            record = self._begun(dataset.described, str(model.dtype).removeprefix("torch."))
            with self.progress.bar(
                "teach", rows + sum(len(batch["targets"]) for batch in dataset.validation)
            ) as advance:
                self._part("held_out", dataset.validation, model, record, advance)
                self._part("train", self._training(dataset, rows, record), model, record, advance)
        shards = record["shards"].values()
        predicted = sum(shard["predicted"] for shard in shards)
        if not predicted:
            raise ShortstackError(f"{self.data}: it has no tokens to predict", hint="give longer texts or rows")
        mass = sum(shard["mass"] * shard["predicted"] for shard in shards) / predicted
        made = {"schema": 1, "kind": KIND, **self.key, **record}
        return {**made, "rows": sum(shard["rows"] for shard in shards), "predicted": predicted, "mass": mass}

    def _begun(self, data: dict[str, Any], dtype: str) -> dict[str, Any]:
        """The record that an earlier run left, if it is of this one; else a fresh one."""
        self.key = {
            "teacher": self.teacher.source, "fingerprint": self.teacher.fingerprint,
            "vocabulary": _vocabulary(self.teacher), "data": data, "settings": self.settings, "dtype": dtype,
            "tokenizer": self.teacher.tokenizer.described() if self.teacher.tokenizer is not None else None,
        }  # fmt: skip
        record, differs = load_state(self.work / _STATE, self.key)
        if record and not differs:
            self.progress.say(f"resuming after {len(record['shards'])} shards ({self.work})")
            return record
        if differs:
            self.progress.say(unused(self.work, differs))
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        return {"shards": {}, "streams": {}, "versions": versions()}

    def _training(self, dataset: Any, rows: int, record: dict[str, Any]) -> Iterator[Batch]:
        """The batches that are trained on, each row once, from the one after the last shard on."""
        from shortstack.data.collators import Sharding

        done = sum(shard["rows"] for name, shard in record["shards"].items() if name.startswith("train"))
        micro = min(self.settings["micro_batch"], _ROWS_PER_SHARD, rows)
        stream = record["streams"].get(_last(record, "train"), {})
        loader = iter(dataset.loader(Sharding(micro, micro), done // micro, -(-rows // micro), stream, 0))
        for start in range(done, rows, micro):
            batch = next(loader)
            left = rows - start
            yield {key: value[:left] if hasattr(value, "shape") else value for key, value in batch.items()}

    def _part(self, part: str, batches: Iterable[Batch], model: Teacher, record: dict[str, Any], advance: Any) -> None:
        """Shards of one part; those of `held_out` that are there already are made of the first batches."""
        names = [name for name in record["shards"] if name.startswith(part)]
        skipped = sum(record["shards"][name]["rows"] for name in names) if part == "held_out" else 0
        stream: dict[str, Any] = {}
        for number, shard in enumerate(_shards(batches, skipped), start=len(names)):
            rows: list[dict[str, np.ndarray]] = []
            logits = model.logits(shard)
            for batch in shard:
                rows += self._taught(batch, next(logits))  # one batch's at a time: they are large
                advance(len(batch["targets"]))
                stream |= batch.get("stream", {})
            self._save(f"{part}-{number:05d}.npz", rows, stream, record)

    def _taught(self, batch: Batch, logits_BTV: torch.Tensor) -> list[dict[str, np.ndarray]]:
        """Each row of a batch with the teacher's top log-probabilities at what it predicts."""
        import torch
        from torch.nn import functional

        from shortstack.data.instructions import IGNORED

        rows = []
        for row in range(len(logits_BTV)):
            chosen_T = batch["targets"][row] != IGNORED
            logits_NV = logits_BTV[row][chosen_T.to(logits_BTV.device)].float() / self.settings["temperature"]
            if not bool(torch.isfinite(logits_NV).all()):
                raise ShortstackError(f"{self.teacher.source}: its logits are not finite", hint="--dtype float32")
            top = functional.log_softmax(logits_NV, dim=-1).topk(self.settings["top_k"], dim=-1)
            mask_T = batch["attention_mask"][row].bool() if "attention_mask" in batch else torch.ones_like(chosen_T)
            rows.append(
                {
                    "ids": batch["input_ids"][row][mask_T].numpy().astype(np.int32),
                    "targets": batch["targets"][row][mask_T].numpy().astype(np.int32),
                    "positions": batch["position_ids"][row][mask_T].numpy().astype(np.int32),
                    "top_ids": top.indices.cpu().numpy(),
                    "top_logprobs": top.values.cpu().numpy().astype(np.float16),
                }
            )
        return rows

    def _save(
        self, name: str, rows: Sequence[dict[str, np.ndarray]], stream: dict[str, Any], record: dict[str, Any]
    ) -> None:
        """One shard, then the record that counts it."""
        small = np.uint16 if _vocabulary(self.teacher) <= 1 << 16 else np.uint32
        logprobs_NK = np.concatenate([row["top_logprobs"] for row in rows])
        arrays = {
            "lengths": np.array([len(row["ids"]) for row in rows], dtype=np.int32),
            "predicted": np.array([len(row["top_ids"]) for row in rows], dtype=np.int32),
            **{key: np.concatenate([row[key] for row in rows]) for key in ("ids", "targets", "positions")},
            # Column by column, and high and low bytes apart: like stands by like, and compresses.
            "top_ids": np.concatenate([row["top_ids"] for row in rows]).astype(small).T,
            "top_logprobs": logprobs_NK.T.copy().view(np.uint8).reshape(logprobs_NK.shape[1], -1, 2).transpose(2, 0, 1),
        }
        path = self.work / f".{name}"
        with path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **{key: np.ascontiguousarray(a) for key, a in arrays.items()})
        data = path.read_bytes()
        path.replace(self.work / name)
        probabilities = np.exp(logprobs_NK.astype(np.float32)).sum(axis=1)
        record["shards"][name] = {
            "rows": len(rows), "predicted": len(logprobs_NK), "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(), "mass": float(probabilities.mean()) if len(probabilities) else 0.0,
        }  # fmt: skip
        record["streams"] = {name: stream} if name.startswith("train") else record["streams"]
        save_state(self.work / _STATE, self.key, **record)


def _shards(batches: Iterable[Batch], skipped: int) -> Iterator[list[Batch]]:
    """The batches of each shard, without the first ones that hold so many rows."""
    shard: list[Batch] = []
    for batch in batches:
        if skipped > 0:
            skipped -= len(batch["targets"])
            continue
        shard.append(batch)
        if sum(len(one["targets"]) for one in shard) >= _ROWS_PER_SHARD:
            yield shard
            shard = []
    if shard:
        yield shard


def _last(record: dict[str, Any], part: str) -> str:
    return max((name for name in record["shards"] if name.startswith(part)), default="")
