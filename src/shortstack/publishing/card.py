"""`shortstack card`: write the model card of a checkpoint again, with the figures of results files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.artifacts import provenance
from shortstack.artifacts.results import Result, load_results
from shortstack.checkpoint.hub import parse_hub_id
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.options import stage
from shortstack.common.progress import Progress
from shortstack.common.shown import Shown
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_model
from shortstack.publishing.card_figures import benchmark_entries, figures_of, results_of
from shortstack.publishing.card_text import CARD, carried_over
from shortstack.publishing.model_card import write_card
from shortstack.runtime.atomic_output import locked, write_file
from shortstack.runtime.hashes import file_sha256

EVAL_RESULTS = ".eval_results/shortstack.yaml"


@dataclass(frozen=True, repr=False)
class CardResult(Shown):
    """The model card that was written.

    Attributes:
        directory: The directory of the checkpoint.
        figures: The number of results that the card shows.
        files: The files that were written, relative to the directory.
        notes: What the card does not show, and why.
    """

    directory: Path
    figures: int
    files: Sequence[str]
    notes: Sequence[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "schema": 1, "directory": str(self.directory), "figures": self.figures, "files": list(self.files),
            "notes": list(self.notes),
        }  # fmt: skip

    def to_text(self) -> str:
        """What a person reads on the terminal."""
        shown = f"with {self.figures} result{'s' * (self.figures != 1)}" if self.figures else "without figures"
        return "\n".join([f"{self.directory}: {', '.join(self.files)} written, {shown}", *self.notes])


@stage
def card(
    directory: Path,
    *results: Path,
    base_model: str | None = None,
    license: str | None = None,
    eval_results: bool = False,
    force: bool = False,
    quiet: bool = False,
) -> CardResult:
    """Update the model card of a checkpoint that shortstack made, with the figures of results files.

    Only README.md and its hash in shortstack.json are replaced. A results file must have results of this checkpoint,
    which is recognised by its fingerprint; results of its dense model are shown beside them.

    Args:
        directory: A checkpoint that shortstack wrote.
        results: The files that `shortstack eval` or `shortstack bench` wrote.
        base_model: The hub id of the dense model, if shortstack.json does not have it.
        license: The licence of the checkpoint by the hub's name, such as `apache-2.0`, if the card of the original did
            not state it.
        eval_results: Also write the accuracies on complete tasks to .eval_results/shortstack.yaml. The hub shows
            accuracies on data sets that it lists as benchmarks.
        force: Replace a README.md that was edited.
        quiet: Show no progress on stderr.

    Returns:
        What was written.

    Raises:
        ShortstackError: shortstack did not make the checkpoint, its card was edited, or a file has only results of
            other models.
    """
    directory = Path(directory)
    checkpoint, record = _opened(directory, Progress(quiet=quiet))
    own, dense, notes = _chosen(results, checkpoint, record)
    carried = carried_over(directory / CARD)
    if license is not None:
        carried["license"] = _hub_license(license)
    if base_model is not None:
        record["base_model"] = _hub_id(base_model)
    entries = benchmark_entries(own) if eval_results else []
    if eval_results and not entries:
        raise UsageError(
            "--eval-results: no file has the accuracy on all rows of a task",
            hint="run shortstack eval zeroshot without --limit",
        )
    with locked(directory):
        _refuse_edited(directory, record, force)
        written = [CARD]
        if entries:
            write_file(directory / EVAL_RESULTS, _as_yaml(entries))
            record["files"][EVAL_RESULTS] = file_sha256(directory / EVAL_RESULTS)
            written.append(EVAL_RESULTS)
        write_card(directory, record, carried, figures_of(own, dense))
    return CardResult(directory, len(own), written, notes)


def without_card(record: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's record but for what a new card changes of it."""
    files = {name: sha256 for name, sha256 in record["files"].items() if name not in (CARD, EVAL_RESULTS)}
    return {**{key: value for key, value in record.items() if key != "base_model"}, "files": files}


def _opened(directory: Path, progress: Progress) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint and its record."""
    if not directory.is_dir():
        raise ShortstackError(f"{directory}: no such directory", hint="give the local directory of a checkpoint")
    record = provenance.read(directory)
    if record is None or not record["steps"]:
        raise ShortstackError(
            f"{directory}: was not made by shortstack (no {provenance.FILE_NAME} with its steps)",
            hint="give a checkpoint that prune, retrain, merge or quantize wrote",
        )
    checkpoint = open_model(str(directory), progress=progress)
    if checkpoint.revision:
        raise ShortstackError(
            f"{directory}: is in the cache of the hub, which is never changed",
            hint="copy it to another directory first",
        )
    return checkpoint, record


def _chosen(
    files: Sequence[Path], checkpoint: Checkpoint, record: dict[str, Any]
) -> tuple[list[Result], list[Result], list[str]]:
    """(results of the checkpoint, of its dense model, what was left out), of all files."""
    own: list[Result] = []
    dense: list[Result] = []
    notes = []
    for file in files:
        loaded = load_results(file).results
        found = results_of(loaded, checkpoint.fingerprint)
        others = results_of(loaded, record.get("source_fingerprint", ""))
        if not found:
            models = ", ".join(dict.fromkeys(result.model for result in loaded))
            raise ShortstackError(
                f"{file}: has no result of the current {checkpoint.source} (results of: {models})",
                hint=f"shortstack eval ppl {shlex.quote(checkpoint.source)} --out own-results.json measures it",
            )
        own += found
        dense += others
        left = list(dict.fromkeys(r.model for r in loaded if r not in found and r not in others))
        if left:
            notes.append(f"{file}: the card does not show results of other models: {', '.join(left)}")
    return own, dense, notes


def _refuse_edited(directory: Path, record: dict[str, Any], force: bool) -> None:
    path, known = directory / CARD, record["files"].get(CARD)
    if path.is_file() and not force and file_sha256(path) != known:
        raise ShortstackError(
            f"{path}: was edited since it was written", hint="keep a copy of your text; --force replaces the file"
        )


def _hub_license(given: str) -> str:
    if not re.fullmatch(r"[\w.+-]+", given):
        raise UsageError(f"--license {given!r}: expected the hub's name of a licence, such as apache-2.0 or other")
    return given


def _hub_id(given: str) -> str:
    found = parse_hub_id(given)
    if found is None or found[1] is not None or given.startswith("."):
        raise UsageError(f"--base-model {given}: expected an id on the hub, such as org/name")
    return given


def _as_yaml(entries: Sequence[Any]) -> bytes:
    import yaml
    from huggingface_hub import eval_result_entries_to_yaml

    return yaml.safe_dump(eval_result_entries_to_yaml(list(entries)), sort_keys=False).encode()
