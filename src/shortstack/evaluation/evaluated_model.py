"""The checkpoints that are evaluated: each opened once, its model and tokenizer loaded when something needs them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.artifacts.csv_folder import check_csv_folder
from shortstack.artifacts.provenance import versions
from shortstack.artifacts.results import Figure, Result, Results
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.clock import command_seconds
from shortstack.common.json_text import json_text
from shortstack.common.progress import Progress
from shortstack.data.tokenizer import load_tokenizer
from shortstack.errors import ShortstackError, UsageError
from shortstack.evaluation.csv_files import write_published_csv
from shortstack.evaluation.options import EvaluationOptions
from shortstack.families.open_model import open_model
from shortstack.runtime.atomic_output import check_writable_file
from shortstack.runtime.devices import pick_device, pick_dtype
from shortstack.runtime.memory import Usage, used
from shortstack.runtime.workspace import cache, cached

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Files beside config and weights that figures depend on: the tokenizer's, and what ends a text.
_BESIDE = ("*token*", "vocab*", "merges.txt", "*.model", "generation_config.json")


class Subject:
    """One checkpoint under evaluation.

    Attributes:
        checkpoint: opened, its headers and config checked.
        options: how it is run.
        progress: where lines are said.
    """

    def __init__(self, checkpoint: Checkpoint, options: EvaluationOptions, progress: Progress) -> None:
        self.checkpoint, self.options, self.progress = checkpoint, options, progress

    @property
    def name(self) -> str:
        """What the user called it."""
        return self.checkpoint.source

    @property
    def rows(self) -> int:
        """Rows of the token embedding: ids from 0 to this exist."""
        return self.checkpoint.embedding_rows

    @functools.cached_property
    def place(self) -> torch.device:
        """Where it is run."""
        return pick_device(self.options.device)

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """What it is computed in."""
        stored = self.checkpoint.tensors[self.checkpoint.anatomy.embedding].dtype
        return pick_dtype(self.options.dtype, stored, self.place)

    @property
    def settings(self) -> dict[str, str]:
        """Precision and device, as results name them."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.place)}

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer, or the one chosen in its place."""
        return load_tokenizer(self.checkpoint, trust_remote_code=self.options.trust_remote_code)

    @functools.cached_property
    def model(self) -> Any:
        """The whole model, in evaluation mode, where it is run.

        Raises:
            ShortstackError: it cannot be loaded, or its logits are not finite: any figure of it would be made up.
        """
        import torch

        from shortstack.engine.load import load_model

        options = self.options
        model, _, _ = load_model(
            self.checkpoint, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code
        )
        ids_BT = torch.arange(min(8, self.rows), device=self.place)[None]
        with torch.no_grad():
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        if not bool(torch.isfinite(logits_BTV).all()):
            raise ShortstackError(
                f"{self.name}: its logits are not finite",
                hint=f"shortstack check {self.name} shows where; or use --dtype float32",
            )
        return model

    def release(self) -> None:
        """Let the model go: the next subject needs the memory."""
        self.__dict__.pop("model", None)
        if self.place.type == "cuda":
            import torch

            torch.cuda.empty_cache()

    def found(
        self, what: str, key: dict[str, Any], make: Callable[[], dict[str, Any]], *, or_of: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], Usage]:
        """(what `make` gives, what it took): of an earlier run, where this very model was measured in this very way.

        Args:
            what: the name of the measurement, for a line of progress.
            key: what is measured, on what, with which settings.
            make: measures it.
            or_of: the key of a measurement that this one is a part of: what was found of it is taken as well.
        """
        rest = {"model": self.identity(), "settings": self.settings, "versions": versions("lm_eval")}
        keys = [{**rest, "what": one} for one in (key, or_of) if one is not None]
        earlier = (cached(one) for one in keys if not self.options.fresh)
        record = next((one for one in earlier if one is not None), None)
        if record is not None:
            self.progress.say(f"{self.name}: {what}: cached by an earlier run (--fresh computes it again)")
        else:
            with used(self.place) as usage:
                found = make()
            record = {"found": found, "usage": usage.to_json()}
            cache(keys[0], record)
        return record["found"], Usage(**record["usage"])

    def result(
        self,
        what: str,
        usage: Usage,
        *,
        data: dict[str, Any],
        settings: dict[str, Any],
        figures: dict[str, Figure],
        per_item: dict[str, list[Any]],
        notes: Sequence[str] = (),
    ) -> Result:
        """The record of what was found on this checkpoint."""
        chosen = self.checkpoint.tokenizer
        return Result(
            model=self.name,
            fingerprint=self.checkpoint.fingerprint,
            what=what,
            data=data,
            settings={
                **self.settings,
                **({"tokenizer_from": chosen.described()} if chosen is not None else {}),
                **settings,
            },
            figures=figures,
            parameters=self.checkpoint.parameters(),
            nbytes=self.checkpoint.nbytes,
            seconds=usage.seconds,
            peak_rss_bytes=usage.peak_rss_bytes,
            peak_device_bytes=usage.peak_device_bytes,
            per_item=per_item,
            notes=list(notes),
        )

    def identity(self) -> dict[str, Any]:
        """What makes this checkpoint this one: its fingerprint sees both ends of a tensor, times of change the rest."""
        beside = hashlib.sha256()
        for path in sorted(
            {path for name in _BESIDE for path in self.checkpoint.directory.glob(name) if path.is_file()}
        ):
            beside.update(path.name.encode() + path.read_bytes())
        record = json_text(self.checkpoint.provenance, sort_keys=True, default=str).encode()
        files = [path.stat() for path in self.checkpoint.shards]
        chosen = self.checkpoint.tokenizer
        return {
            **({"tokenizer": chosen.sha256} if chosen is not None else {}),
            "fingerprint": self.checkpoint.fingerprint,
            "files": [[stat.st_size, stat.st_mtime_ns] for stat in files],
            "beside": beside.hexdigest(),
            "record": hashlib.sha256(record).hexdigest(),
        }


def open_subjects(
    verb: str, models: Sequence[str], options: EvaluationOptions, out: Path | None, csv: Path | None = None
) -> list[Subject]:
    """Open every checkpoint of an evaluation before any of them is run.

    Raises:
        ShortstackError: none was given, one cannot be opened, or `out` or `csv` could not be written.
    """
    if not models:
        raise UsageError("no model given", hint=f"shortstack eval {verb} MODEL...")
    if options.batch != "auto" and options.batch < 1:
        raise UsageError(f"--batch {options.batch}: expected at least 1, or auto")
    if out is not None:
        check_writable_file(Path(out))
    check_csv_folder(csv)
    progress = Progress(quiet=options.quiet)
    return [open_subject(model, options, progress) for model in models]


def open_subject(model: str, options: EvaluationOptions, progress: Progress) -> Subject:
    """Open one checkpoint, with the tokenizer that the options name, if they name one.

    Raises:
        ShortstackError: it cannot be opened.
    """
    checkpoint = open_model(model, allow_links=options.allow_links, tokenizer=options.tokenizer, progress=progress)
    return Subject(checkpoint, options, progress)


def evaluated(
    subjects: Sequence[Subject],
    measure: Callable[[Subject], Sequence[Result]],
    out: Path | None,
    csv: Path | None = None,
) -> Results:
    """Measure one subject after the other, with one model in memory at a time, and write the results.

    Args:
        subjects: what is measured.
        measure: the results of one of them.
        out: results.json, or None.
        csv: the folder of the published tables, or None.
    """
    results: list[Result] = []
    for subject in subjects:
        results += measure(subject)
        subject.release()
    return written(Results(tuple(results)), out, csv)


def written(found: Results, out: Path | None, csv: Path | None) -> Results:
    """The results of a command, once they lie where they were wanted."""
    found = found.in_time(command_seconds())
    if out is not None:
        found.save(out)
    if csv is not None:
        write_published_csv(found.results, csv)
    return found
