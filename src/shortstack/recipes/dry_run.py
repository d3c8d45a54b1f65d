"""A dry run: everything that a run would need is looked at, nothing is computed, and what it would leave is estimated."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.artifacts.plan import PrunePlan, load_plan
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.extras import missing_packages
from shortstack.common.formatting import aligned_left, count, size
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_model
from shortstack.pruning.plan import amount_to_remove, parse_amount, plan_for, protected_blocks
from shortstack.recipes.cache_keys import model_identity, step_key
from shortstack.recipes.data_checks import check_data, needs_text
from shortstack.recipes.resolve import Recipe, Reference, Step
from shortstack.recipes.run_folder import RunFolder
from shortstack.recipes.stages import REFERENCES

_STATE_BYTES = 12  # of each trained parameter in a saved state: itself and AdamW's two moments, in float32
_SAVED_STATES = 3  # the last two and the best
_KEPT_LOGIT_BYTES = 6  # a token id and a float16
_STORED_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class _Shape:
    """A checkpoint, or what will be left of one.

    Attributes:
        checkpoint: that it is, or comes from.
        kept: the places of its blocks that are left.
        stored: bytes of a parameter, where it will be stored in another precision.
    """

    checkpoint: Checkpoint
    kept: tuple[int, ...]
    stored: int | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        sizes = self.checkpoint.block_parameters()
        return self.checkpoint.parameters() - sum(sizes) + sum(sizes[place] for place in self.kept)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        if self.stored is not None:
            return self.parameters * self.stored
        sizes = [sum(tensor.nbytes for tensor in block) for block in self.checkpoint.blocks]
        return self.checkpoint.nbytes - sum(sizes) + sum(sizes[place] for place in self.kept)

    def without(self, count_of_blocks: int) -> _Shape:
        """With that many blocks less; which ones is not known yet, so the first that may go."""
        protected = set(protected_blocks(range(len(self.kept)), None)[0])
        free = [place for number, place in enumerate(self.kept) if number not in protected]
        gone = set((free if count_of_blocks <= len(free) else list(self.kept))[:count_of_blocks])
        return dataclasses.replace(self, kept=tuple(place for place in self.kept if place not in gone))


@dataclass(frozen=True)
class Foreseen:
    """What a step would do.

    Attributes:
        name, verb: which step.
        standing: `done` where an earlier run in the same folder has done it.
        makes: what it would leave behind.
        nbytes: how much of the disk that would take, and what it needs while it runs.
    """

    name: str
    verb: str
    standing: str
    makes: str
    nbytes: int
    temporary_nbytes: int = 0


@dataclass(frozen=True)
class Rehearsal:
    """What a run would do (`--dry-run`).

    Attributes:
        out: its folder.
        recipe, model: what would be run, on what.
        steps: in order.
        problems: why it would fail, by step.
        notes: what could not be looked at.
        needed_bytes, free_bytes: of the disk.
    """

    out: Path
    recipe: str
    model: str
    steps: list[Foreseen]
    left_out: dict[str, str]
    problems: list[str]
    notes: list[str]
    needed_bytes: int
    free_bytes: int
    options: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """1 where the run would fail."""
        return 1 if self.problems else 0

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        steps = [{**one.__dict__, "options": self.options[one.name]} for one in self.steps]
        return {"schema": 1, **self.__dict__, "out": str(self.out), "steps": steps, "would_run": not self.problems}

    def to_text(self) -> str:
        """The plan, and what is wrong with it."""
        rows = [
            [one.name, one.verb, one.standing, one.makes, size(one.nbytes) if one.nbytes else "-",
             size(one.temporary_nbytes) if one.temporary_nbytes else "-"]
            for one in self.steps
        ]  # fmt: skip
        lines = [
            f"dry run of {self.recipe} on {self.model}: nothing was computed",
            aligned_left(["step", "stage", "", "would leave", "disk", "while it runs"], rows),
            *(f"{name} is left out: {why}" for name, why in self.left_out.items()),
            f"{self.out}: about {size(self.needed_bytes)} needed, {size(self.free_bytes)} free",
            *(f"note: {note}" for note in self.notes),
            *(f"would fail: {problem}" for problem in self.problems),
        ]
        return "\n".join(
            [*lines, "it would not run" if self.problems else "everything that can be looked at is in order"]
        )


def rehearsed(recipe: Recipe, out: Path) -> Rehearsal:
    """Look at everything that a run would need.

    Raises:
        ShortstackError: something else than a run lies in `out`.
    """
    return _Rehearser(recipe, RunFolder.open(out)).rehearsal()


@dataclass
class _Rehearser:
    recipe: Recipe
    folder: RunFolder
    shapes: dict[str, _Shape] = field(default_factory=dict)  # of checkpoints, by step
    plans: dict[str, _Shape] = field(default_factory=dict)  # what plans will leave, by step
    made: dict[str, str] = field(default_factory=dict)  # identities of what is done already
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rehearsal(self) -> Rehearsal:
        steps = []
        try:
            self.shapes["model"] = _shape_of(self.recipe.model)
        except ShortstackError as error:
            self._problem("model", error)
        for step in self.recipe.steps:
            steps.append(self._foreseen(step))
        needed = sum(one.nbytes for one in steps) + max((one.temporary_nbytes for one in steps), default=0)
        folder = next(one for one in (self.folder.path, *self.folder.path.parents) if one.exists())
        free = shutil.disk_usage(folder).free
        if needed > free:
            self.problems.append(
                f"{folder}: {size(needed)} needed, {size(free)} free; make room, or choose another --out"
            )
        options = {
            step.name: {name: [str(part) for part in value] if isinstance(value, list) else
                        str(value) if isinstance(value, Reference) else value
                        for name, value in step.values.items()}
            for step in self.recipe.steps
        }  # fmt: skip
        return Rehearsal(
            self.folder.path, self.recipe.name, self.recipe.model, steps, self.recipe.left_out,
            list(dict.fromkeys(self.problems)), list(dict.fromkeys(self.notes)), needed, free, options,
        )  # fmt: skip

    def _problem(self, step: str, error: ShortstackError) -> None:
        self.problems.append(f"{step}: {error.message}" + (f" ({error.hint})" if error.hint else ""))

    def _foreseen(self, step: Step) -> Foreseen:
        if self._standing(step) == "done":
            self._remember(step, self._result_shape(step))
            return Foreseen(step.name, step.stage.verb, "done", "", 0)
        missing, install = missing_packages(step.stage.verb)
        if missing:
            self.problems.append(f"{step.name}: needs {', '.join(missing)} (pip install {install})")
        for name, value in step.values.items():
            self._look_at(step, name, value)
        try:
            self.notes += check_data(step)
            self._check_positions(step)
            shape = self._result_shape(step)
        except ShortstackError as error:
            self._problem(step.name, error)
            shape = None
        self._remember(step, shape)
        makes, nbytes, temporary = self._left(step, shape)
        return Foreseen(step.name, step.stage.verb, "", makes, nbytes, temporary)

    def _standing(self, step: Step) -> str:
        if not self.folder.record or any(name not in self.made for name in self._needs(step)):
            return "new"
        try:
            self.made.setdefault("model", model_identity(self.recipe.model))
            standing, changed = self.folder.standing(step, step_key(step, self.made))
        except ShortstackError:
            return "new"  # what is missing is a problem of its own
        if standing == "other":
            self.problems.append(
                f"{step.name}: was made with other settings in {self.folder.path}: {'; '.join(changed)} (--force)"
            )
        identity = self.folder.identity(step)
        if standing == "done" and identity is not None:
            self.made[step.name] = identity
        return standing

    def _needs(self, step: Step) -> set[str]:
        parts = [part for value in step.values.values() for part in (value if isinstance(value, list) else [value])]
        return {part.step for part in parts if isinstance(part, Reference)} - {"model"}

    def _look_at(self, step: Step, name: str, value: Any) -> None:
        """Models that are named besides the recipe's."""
        for part in value if isinstance(value, list) else [value]:
            if "checkpoint" in REFERENCES.get(name, ()) and isinstance(part, str):
                try:
                    open_model(part, headers_only=True, progress=Progress(quiet=True))
                except ShortstackError as error:
                    self._problem(step.name, error)

    def _check_positions(self, step: Step) -> None:
        """Windows and continuations that are longer than the model can take; evaluations leave such lengths out."""
        option = {"score": "seq_len", "eval samples": "new_tokens"}.get(step.stage.verb)
        if step.stage.verb == "score" and not needs_text(step.values):
            return
        models = step.values.get("models") or [step.values.get("model")]
        for shape in filter(None, map(self._shape, models)):
            positions = shape.checkpoint.positions
            if option is None or positions is None:
                continue
            asked = step.values.get(option, step.stage.parameters[option].default)
            if asked > positions:
                raise ShortstackError(
                    f"{option} is {asked}, but {shape.checkpoint.source} has {positions} positions",
                    hint=f"--set {step.name}.{option}={positions}",
                )

    def _remember(self, step: Step, shape: _Shape | None) -> None:
        if shape is not None and "checkpoint" in step.makes:
            self.shapes[step.name] = shape
        elif shape is not None and "plan" in step.makes:
            self.plans[step.name] = shape

    def _result_shape(self, step: Step) -> _Shape | None:
        """What the checkpoint that a step makes, or plans, will be; None where it makes none, or its model is unknown."""
        values = step.values
        base = values.get("base" if step.stage.verb == "merge" else "model")
        shape = self._shape(base)
        if shape is None or not {"checkpoint", "adapter", "plan"} & set(step.makes):
            return None
        if step.stage.verb in ("plan", "prune"):
            return self._shortened(shape, values)
        stored = values.get("save_dtype")
        return shape if stored is None else dataclasses.replace(shape, stored=_STORED_BYTES[stored])

    def _shape(self, model: Any) -> _Shape | None:
        if isinstance(model, Reference):
            return self.shapes.get(model.step)
        try:
            return _shape_of(model) if isinstance(model, str) else None
        except ShortstackError:
            return None

    def _shortened(self, shape: _Shape, values: dict[str, Any]) -> _Shape | None:
        plan = values.get("plan")
        if isinstance(plan, Reference):
            return self.plans.get(plan.step)
        checkpoint = shape.checkpoint
        is_whole = len(shape.kept) == checkpoint.depth
        if isinstance(plan, str):
            return _planned(shape, load_plan(plan))
        asked: dict[str, Any] = {
            name: values.get(name) for name in ("blocks", "criterion", "remove", "ratio", "params", "plus")
        }
        scores = values.get("scores")
        if is_whole and not isinstance(scores, Reference):
            return _planned(
                shape, plan_for(checkpoint, scores=scores, strategy=values.get("strategy", "one-shot"), **asked).plan
            )
        if is_whole and scores is not None:
            # Which blocks go is not known before they are scored; that so many may go is.
            plan_for(checkpoint, scores=_any_order(checkpoint), **{**asked, "criterion": None})
        sizes = [checkpoint.block_parameters()[place] for place in shape.kept]
        if asked["blocks"] is not None:
            return shape.without(len(str(asked["blocks"]).split(",")))
        return shape.without(
            amount_to_remove(sizes, shape.parameters, asked["remove"], asked["ratio"], asked["params"])
        )

    def _left(self, step: Step, shape: _Shape | None) -> tuple[str, int, int]:
        """(what a step leaves behind, bytes of it, bytes that it needs while it runs)."""
        verb, values = step.stage.verb, step.values
        if verb == "teach":
            tokens = values.get("tokens")
            nbytes = (
                parse_amount(tokens, "tokens", "tokens") * values.get("top_k", 64) * _KEPT_LOGIT_BYTES if tokens else 0
            )
            return "notes", nbytes, 0
        if shape is None:
            return {"scores": "scores", "results": "figures"}.get(step.stage.makes, step.stage.makes), 0, 0
        described = f"{len(shape.kept)} blocks, {count(shape.parameters)} parameters"
        if step.stage.makes == "plan":
            return described, 0, 0
        saved = 0
        if verb.startswith("retrain"):
            trained = shape.parameters
            if verb == "retrain lora" or values.get("train") == "lora":
                trained = _adapter_parameters(shape, values.get("rank", 8))
            saved = _SAVED_STATES * _STATE_BYTES * trained
            if values.get("merge") is False:
                return f"an adapter of {count(trained)} parameters", 4 * trained, saved
        return described, shape.nbytes, saved


def _shape_of(model: str) -> _Shape:
    checkpoint = open_model(model, headers_only=True, progress=Progress(quiet=True))
    return _Shape(checkpoint, tuple(range(checkpoint.depth)))


def _planned(shape: _Shape, plan: PrunePlan) -> _Shape:
    kept = tuple(shape.checkpoint.position_of(index) for index in plan.kept)
    return dataclasses.replace(shape, kept=kept)


def _any_order(checkpoint: Checkpoint) -> Any:
    from shortstack.artifacts.scores import CriterionScores, Scores

    blocks: Sequence[int] = checkpoint.original_blocks
    only = CriterionScores("any", (), tuple(blocks), known_order=tuple(blocks))
    return Scores(checkpoint.source, None, tuple(blocks), {"any": only})


def _adapter_parameters(shape: _Shape, rank: int) -> int:
    """Of rank-r factors beside every matrix of the blocks that are left."""
    blocks = [shape.checkpoint.blocks[place] for place in shape.kept]
    return sum(rank * sum(tensor.shape) for block in blocks for tensor in block if len(tensor.shape) == 2)
