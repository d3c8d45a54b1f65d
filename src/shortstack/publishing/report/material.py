"""What was found for a report, as records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shortstack.artifacts.plan import PrunePlan
from shortstack.artifacts.results import Result
from shortstack.artifacts.scores import Scores
from shortstack.artifacts.training import TrainingLog
from shortstack.common.json_fields import nested


@dataclass(frozen=True)
class History:
    """Where a checkpoint came from.

    Attributes:
        name: its folder's.
        record: its shortstack.json.
        fingerprint: of the checkpoint as it lies there; None where its weights are gone.
    """

    name: str
    record: dict[str, Any]
    fingerprint: str | None

    @property
    def role(self) -> str:
        """What the checkpoint is: pruned, retrained, quantized; the last step that says so."""
        words = {
            "prune": "pruned", "prune-width": "pruned", "repair": "repaired", "retrain": "retrained", "merge": "retrained",
        }  # fmt: skip
        stages = [str(step.get("stage")) for step in self.record["steps"]]
        return (
            "quantized" if "quantize" in stages else next((words[one] for one in reversed(stages) if one in words), "")
        )

    @property
    def fingerprints(self) -> set[str]:
        """Of itself, of the checkpoint that all began with, and of every one on the way."""
        steps = {nested(step, "fingerprint") for step in self.record["steps"]}
        known = (self.fingerprint, self.record.get("source_fingerprint"), *steps)
        return {one for one in known if isinstance(one, str)}


@dataclass(frozen=True)
class UsedFile:
    """A file that the report is made of.

    Attributes:
        name: of the file, with its folder's where it lies in one that was given.
        kind: what it is.
        sha256: of its bytes.
    """

    name: str
    kind: str
    sha256: str


@dataclass
class Material:
    """Everything that was found.

    Attributes:
        scores, results: in the order of the files.
        plan: the one plan that the report is about; None where nothing says what was removed.
        trainings: by the name of the checkpoint.
        histories: of checkpoints.
        run: the content of run.json, where a run's folder was given.
        published: names of published figures that a comparison among the files has beside its own.
        files: what was read.
        left_out: what lies there and is no part of a report.
    """

    scores: list[Scores] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    plan: PrunePlan | None = None
    trainings: dict[str, TrainingLog] = field(default_factory=dict)
    histories: list[History] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    published: list[str] = field(default_factory=list)
    files: list[UsedFile] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to report."""
        return not (self.scores or self.results or self.plan or self.trainings or self.histories)

    @property
    def dense_fingerprint(self) -> str | None:
        """Of the model that everything began with; None where no record says so."""
        found = [self.plan.fingerprint] if self.plan is not None else []
        found += [str(one.record["source_fingerprint"]) for one in self.histories if "source_fingerprint" in one.record]
        found += [one.fingerprint for one in self.scores if one.fingerprint is not None]
        return found[0] if found else None
