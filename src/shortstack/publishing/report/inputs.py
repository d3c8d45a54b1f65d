"""What a report is made of: scores, plans, results, training logs and histories, found in files and folders."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from shortstack.artifacts import provenance
from shortstack.artifacts.plan import PrunePlan, load_plan
from shortstack.artifacts.results import Result, load_results
from shortstack.artifacts.scores import load_scores
from shortstack.artifacts.training import load_training
from shortstack.common.json_fields import block_numbers, mapping, nested, text
from shortstack.common.json_text import read_json
from shortstack.common.own_inputs import refuse_inputs
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError, system_reason
from shortstack.publishing.report.material import History, Material, UsedFile
from shortstack.publishing.report.one_model import check_one_model, one_plan

RUN_FILE = "run.json"
_HINT = "give a run's folder, or files that score, plan, eval, bench or retrain wrote"
_AGAIN = "make it again, or leave it out of the report"
FileKind = Literal["results", "scores", "plan", "comparison", "checkpoint", "run", "other"]


def read_material(places: Sequence[Path], out: Path | None = None) -> Material:
    """Read files and folders: run folders, checkpoints, and folders of such files.

    Args:
        places: what to read.
        out: the page that is to be written; none of the files.

    Raises:
        ShortstackError: there is nothing to report, a file is damaged, or they are about different models.
    """
    reader = _Reader()
    for place in places:
        if place.is_dir():
            reader.folder(place)
        else:
            reader.file(place, place.name, given=True)
    if out is not None:
        refuse_inputs(out, sorted(reader.found))
    material = reader.material
    material.plan = one_plan(material, reader.plans)
    if material.is_empty:
        raise ShortstackError(f"{', '.join(map(str, places))}: no records that a report can show", hint=_HINT)
    check_one_model(material)
    return material


class _Reader:
    def __init__(self) -> None:
        self.material = Material()
        self.plans: list[PrunePlan] = []
        self.found: set[Path] = set()

    def folder(self, place: Path) -> None:
        """A run's folder, a checkpoint, or a folder of files and checkpoints."""
        if (place / RUN_FILE).is_file():
            self._run(place)
        elif self._is_checkpoint(place):
            self._checkpoint(place)
        else:
            for path in sorted(place.iterdir()):
                if path.is_dir() and self._is_checkpoint(path):
                    self._checkpoint(path)
                elif path.suffix == ".json" or path.name == "block_order.csv":
                    self.file(path, path.name)

    def file(self, path: Path, name: str, *, given: bool = False) -> None:
        """One file; what is no part of a report is refused where it was given by name, else noted."""
        if _real(path) in self.found:
            return
        self.found.add(_real(path))
        data, kind = _kind_of(path)
        if kind == "run":
            self._run(path.parent)
        elif kind == "checkpoint":
            self._checkpoint(path.parent)
        elif kind == "other":
            if given:
                raise ShortstackError(f"{path}: no records that a report can show", hint=_HINT)
            self.material.left_out.append(name)
        else:
            self._take(path, kind, data)
            self._note(name, kind, data)

    def _take(self, path: Path, kind: FileKind, data: bytes) -> None:
        if kind == "results":
            self.material.results += [_checked(result, path) for result in load_results(path).results]
        elif kind == "scores":
            self.material.scores.append(load_scores(path))
        elif kind == "plan":
            self.plans.append(load_plan(path))
        else:
            names = read_json(data).get("published")
            if not isinstance(names, list):
                raise ShortstackError(f"{path}: a damaged comparison: published is {names!r:.60}", hint=_AGAIN)
            self.material.published += [str(one) for one in names]

    def _run(self, place: Path) -> None:
        """The outputs of a run's steps that are done, in order."""
        path = place / RUN_FILE
        self.found.add(_real(path))
        data = _bytes(path)
        try:
            record = read_json(data)
            steps = mapping(record, "steps")
            done = {name: text(step, "output") for name, step in steps.items() if step.get("state") == "done"}
            order = [str(name) for name in record["order"] if name in done]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ShortstackError(f"{path}: not the record of a run ({error})", hint="run the recipe again") from None
        self.material.run = record
        self._note(RUN_FILE, "run", data)
        for name in order:
            output = place / done[name]
            if not _real(output).is_relative_to(_real(place)):
                raise ShortstackError(f"{path}: {done[name]} of step {name} is outside of the folder of the run")
            name = str(_real(output).relative_to(_real(place)))
            if output.is_dir():
                self._checkpoint(output)
            elif output.is_file():
                self.file(output, name)
            else:
                self.material.left_out.append(f"{name} (no longer there)")

    def _is_checkpoint(self, place: Path) -> bool:
        return any((place / name).is_file() for name in (provenance.FILE_NAME, provenance.RETRAINING_FILES[0]))

    def _checkpoint(self, place: Path) -> None:
        """Its history, and what training left beside it."""
        if _real(place) in self.found:
            return
        self.found.add(_real(place))
        name = _real(place).name
        record = provenance.read(place) if (place / "config.json").is_file() or _tells_blocks(place) else None
        if record is not None:
            _check_history(record, place / provenance.FILE_NAME)
            self.material.histories.append(History(name, record, _fingerprint(place)))
            self._note(f"{name}/{provenance.FILE_NAME}", "checkpoint", _bytes(place / provenance.FILE_NAME))
        log = load_training(place)
        if log is not None:
            self.material.trainings[name] = log
            metrics = provenance.RETRAINING_FILES[0]
            self._note(f"{name}/{metrics}", "training", _bytes(place / metrics))

    def _note(self, name: str, kind: str, data: bytes) -> None:
        self.material.files.append(UsedFile(name, kind, hashlib.sha256(data).hexdigest()))


def _real(path: Path) -> Path:
    """Where links lead; of links in a circle, somewhere that is not there."""
    return Path(os.path.realpath(path))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ShortstackError(f"{path}: cannot be read ({system_reason(error)})", hint=_HINT) from None


def _kind_of(path: Path) -> tuple[bytes, FileKind]:
    data = _bytes(path)
    if path.suffix.lower() == ".csv":
        return data, "scores"
    try:
        record = read_json(data)
    except (ValueError, RecursionError) as error:
        raise ShortstackError(f"{path}: not JSON, or damaged ({error})", hint=_AGAIN) from None
    if isinstance(record, list):
        is_results = bool(record) and isinstance(record[0], Mapping) and "figures" in record[0]
        return data, "results" if is_results else "other"
    keys = set(record) if isinstance(record, Mapping) else set()
    if nested(record, "what") == "compare":
        return data, "comparison"
    known: tuple[tuple[set[str], FileKind], ...] = (
        ({"figures", "what"}, "results"),
        ({"criteria", "model"}, "scores"),
        ({"removed", "kept"}, "plan"),
        ({"kept_blocks"}, "checkpoint"),
        ({"recipe", "steps", "order"}, "run"),
    )
    return data, next((kind for needed, kind in known if needed <= keys), "other")


def _fingerprint(place: Path) -> str | None:
    """Of a checkpoint whose weights are there."""
    from shortstack.families.open_model import open_model

    try:
        return open_model(str(place), progress=Progress(quiet=True)).fingerprint
    except ShortstackError:
        return None


def _tells_blocks(place: Path) -> bool:
    """Whether its record is a checkpoint's: that of an adapter names files alone."""
    path = place / provenance.FILE_NAME
    return path.is_file() and _kind_of(path)[1] == "checkpoint"


def _check_history(record: Mapping[str, Any], path: Path) -> None:
    """Refuse a history whose steps a page cannot show.

    Raises:
        ShortstackError: a fingerprint or a list of blocks is something else.
    """
    texts = [record.get("source_fingerprint"), *(step.get("fingerprint") for step in record["steps"])]
    try:
        if not all(isinstance(one, str | None) for one in texts):
            raise TypeError("a fingerprint is no text")
        for step in record["steps"]:
            if step.get("protected_blocks") is not None:
                block_numbers(step, "protected_blocks")
    except TypeError as error:
        raise ShortstackError(f"{path}: not a record of shortstack ({error})", hint=_AGAIN) from None


_BENCH_SETTINGS = {
    "engine": str, "batch": int, "prompt_tokens": int, "new_tokens": int, "dtype": str, "device": str, "blocks": int,
    "runs": int, "warmup": int, "sampling": str, "prompt": str, "threads": int,
}  # fmt: skip


def _wrong_machine(result: Result) -> str:
    machine = result.settings.get("machine")
    rates = [nested(machine, name) for name in ("bytes_per_second", "operations_per_second")]
    return "" if machine is None or all(isinstance(rate, float | int) for rate in rates) else "machine"


def _checked(result: Result, path: Path) -> Result:
    """A result whose settings and texts a page can show.

    Raises:
        ShortstackError: what its kind must have is missing.
    """
    wrong = ""
    if result.what == "bench" and "draft" not in result.settings:
        wrong = next((n for n, kind in _BENCH_SETTINGS.items() if not isinstance(result.settings.get(n), kind)), "")
        wrong = wrong or ("latency" if "latency" not in result.figures else "") or _wrong_machine(result)
    if result.what == "samples" and not all(isinstance(one, str) for one in result.per_item.get("texts", [])):
        wrong = "texts"
    if wrong:
        raise ShortstackError(
            f"{path}: a damaged results file: {result.what} of {result.model} lacks {wrong}, or has another type there",
            hint=f"measure it again: shortstack {'bench' if result.what == 'bench' else f'eval {result.what}'}",
        )
    return result
