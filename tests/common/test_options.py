"""Options of stages: what callers in Python see, and what a developer is told who forgets something."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import shortstack
from shortstack.cli.app import run
from shortstack.common.options import Options, call_with, fields_of, options_of, stage
from shortstack.errors import UsageError
from shortstack.registry import COMMANDS


@dataclass(frozen=True)
class Base:
    """What is common.

    Attributes:
        hue: the colour, which
            is long to explain.
    """

    hue: str = "red"


@dataclass(frozen=True)
class Paint(Base):
    """How it is painted.

    Attributes:
        coats: how many times.
    """

    coats: int = 1


_PAINT = Paint()


@stage
def painted(what: str, *more: str, paint: Paint = _PAINT, fast: bool = False) -> tuple[str, tuple[str, ...], Paint]:
    """Paint.

    Args:
        what: which.
        more: others.
        paint: how.
        fast: in a hurry.
    """
    return what, more, paint


@dataclass(frozen=True)
class Shared(Options):
    """What records share.

    Attributes:
        first: a shared one that stands in front.
        careful: a shared one that stands behind.
    """

    LAST: ClassVar[tuple[str, ...]] = ("careful",)

    first: int = 1
    careful: bool = False


@dataclass(frozen=True)
class Sharing(Shared):
    """A record.

    Attributes:
        own: its own.
        middle: its own, behind.
        careful: another text for it.
    """

    LAST: ClassVar[tuple[str, ...]] = ("middle", *Shared.LAST)

    middle: int = 2
    own: int = 3


_SHARING = Sharing()


def test_what_records_share_stands_where_they_say_with_their_text() -> None:
    @stage
    def share(what: str, *, record: Sharing = _SHARING) -> Sharing:
        """Share.

        Args:
            what: which.
            record: how.
        """
        return record

    order = ["first", "own", "middle", "careful"]
    assert [field.name for field in fields_of(Sharing)] == order
    assert list(options_of(share)) == ["what", *order]
    assert [name for name in inspect.signature(share).parameters if name != "record"] == ["what", *order]
    assert options_of(share)["careful"].help == "another text for it."
    assert options_of(share)["first"].help == "a shared one that stands in front."
    assert share("it", careful=True, middle=5) == Sharing(middle=5, careful=True)


def test_the_docstring_has_the_fields_in_the_place_of_their_record() -> None:
    shown = inspect.getdoc(painted) or ""
    assert shown.splitlines()[2:] == [
        "Args:",
        "    what: which.",
        "    more: others.",
        "    hue: the colour, which",
        "        is long to explain.",
        "    coats: how many times.",
        "    paint: A `Paint` with the values of `hue` to `coats`. Keywords take precedence.",
        "    fast: in a hurry.",
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_is_in_its_help(name: str) -> None:
    """help(shortstack.score) is all that a Python user has."""
    command = COMMANDS[name]
    shown = inspect.getdoc(command.stage) or ""
    missing = [option for option in command.options if f"\n    {option}: " not in shown]
    assert missing == []
    assert list(inspect.signature(command.stage).parameters) == list(command.options)


def test_options_have_their_help_on_one_line() -> None:
    assert {name: option.help for name, option in options_of(painted).items()} == {
        "what": "which.",
        "more": "others.",
        "hue": "the colour, which is long to explain.",
        "coats": "how many times.",
        "fast": "in a hurry.",
    }


def test_fields_records_and_values_by_position() -> None:
    assert painted("a", "b", "c", paint=Paint("blue"), coats=2) == ("a", ("b", "c"), Paint("blue", 2))


def test_a_mistyped_keyword_gets_the_nearest_field_or_record() -> None:
    for mistyped, nearest in (("coat", "coats"), ("pant", "paint"), ("fst", "fast")):
        with pytest.raises(TypeError, match=rf"painted\(\) has no option '{mistyped}'; did you mean {nearest}\?"):
            painted("a", **{mistyped: 1})
    with pytest.raises(TypeError, match="has no option 'xyz'; known: what, more, paint, fast, hue, coats"):
        painted("a", xyz=1)


def test_values_of_a_wrong_type_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="^coats='2': expected a whole number$"):
        painted("a", coats="2")
    with pytest.raises(UsageError, match="^more=3: expected text$"):
        painted("a", "b", 3)
    with pytest.raises(UsageError, match="^what=3: expected text$"):
        painted(what=3)
    with pytest.raises(UsageError, match="^paint='blue': expected Paint\nor its fields as keywords: hue, coats$"):
        painted("a", paint="blue")


def test_what_a_developer_forgets_is_named() -> None:
    @dataclass(frozen=True)
    class Silent:
        """No attributes here."""

        depth: int = 1

    def silent(*, record: Silent = Silent()) -> None:
        """Nothing.

        Args:
            record: how.
        """

    silent.__annotations__["record"] = Silent
    Silent.__annotations__["depth"] = int
    with pytest.raises(
        TypeError, match="Silent.depth has no help: give it a line under `Attributes:` in the docstring"
    ):
        options_of(silent)

    def speechless(model: str) -> None:
        """Nothing."""

    with pytest.raises(TypeError, match=r"speechless\(model\) has no help: give it a line under `Args:`"):
        options_of(speechless)


def test_two_options_of_one_name_are_named() -> None:
    def twice(*, paint: Paint = _PAINT, base: Base = Base()) -> None:
        """Nothing.

        Args:
            paint: how.
            base: what.
        """

    with pytest.raises(TypeError, match="twice: hue is an option of its record paint and a field of base; rename"):
        options_of(twice)

    def own(*, hue: str = "", paint: Paint = _PAINT) -> None:
        """Nothing.

        Args:
            hue: which.
            paint: how.
        """

    with pytest.raises(TypeError, match="own: hue is an option of its own and a field of paint; rename one of them"):
        stage(own)(coats=2)


def test_what_stands_before_many_values_is_given_by_position() -> None:
    @stage
    def set_beside(first: str, *others: str, loud: bool = False) -> tuple[str, tuple[str, ...], bool]:
        """Set beside.

        Args:
            first: the first.
            others: the others.
            loud: loudly.
        """
        return first, others, loud

    assert call_with(set_beside, {"first": "a", "others": ["b", "c"], "loud": True}) == ("a", ("b", "c"), True)
    assert call_with(set_beside, {"first": "a"}) == ("a", (), False)


RECORDS = sorted(
    {
        type(parameter.default)
        for command in COMMANDS.values()
        for parameter in inspect.signature(inspect.unwrap(command.stage)).parameters.values()
        if dataclasses.is_dataclass(parameter.default)
    },
    key=lambda record: record.__name__,
)
# What a record refuses: class -> values that are out of range or contradict one another.
REFUSED: dict[str, list[dict[str, Any]]] = {
    "AdapterUse": [{"merge": "yes"}],
    "BlockSteps": [{"seq_len": 1}, {"epochs": 0}],
    "BlockTargets": [{"radius": 0}, {"lora_rank": 0}, {"update_weight": -1.0}],
    "BlockChoice": [{"strategy": "oneshot"}, {"blocks": 1.5}],
    "CalibrationOptions": [{"sampling": "pub"}],
    "CalibrationText": [{"samples": "many"}],
    "ConverterOptions": [{"time_limit": "long"}],
    "CurveOptions": [{"most": "x"}],
    "DemoOptions": [{"port": 70000}],
    "DistillationSteps": [{"seq_len": 1}, {"weight_decay": -1.0}, {"tokens": "1M", "epochs": 3}],
    "EngineOptions": [{"time_limit": None}],
    "EvaluationOptions": [{"batch": "many"}],
    "GenerationOptions": [{"seed": "x"}],
    "LoRA": [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"target_modules": "q_proj,"}],
    "MeasuringOptions": [{"memory": 1}],
    "PromptOptions": [{"instruction": False, "prompt_template": "own.json"}],
    "PruneChoice": [{"selection": 4}],
    "PruneOptions": [{"verify": "yes"}],
    "QuantizeOptions": [{"device": 3}],
    "RemovalOptions": [{"plan": "p.json", "dense": "m"}],
    "ReportOptions": [{"draft_tokens": "x"}],
    "RowSteps": [{"lr": 2.0}, {"warmup": -1}, {"cutoff": 1}, {"epochs": 0}],
    "RunOptions": [{"dry_run": 1}],
    "SampleRequest": [{"count": 0}, {"top_p": 2.0}, {"temperature": -1.0}],
    "ScoreOptions": [{"memory": "strem"}, {"dtype": "float23"}],
    "SearchOptions": [{"remove": "x"}],
    "RepairOptions": [{"behind": -1}],
    "StabilityOptions": [{"seeds": 0}],
    "StoppingOptions": [{"until": "stabl"}],
    "SweepOptions": [{"sampling": "pub"}],
    "TaskOptions": [{"tasks": 1.5}],
    "TeachOptions": [{"top_k": 0}, {"temperature": 0.0}, {"micro_batch": 0}, {"validation": -1}],
    "Teaching": [{"kl_weight": -1.0}, {"temperature": 0.0}, {"kl_weight": 0.0, "temperature": 2.0}],
    "TextOptions": [{"seq_len": 1.5}],
    "TextSteps": [{"seq_len": 1}, {"lr": 0.0}],
    "TrainingOptions": [{"max_steps": 0}, {"eval_windows": 3}, {"restart": True, "weights_only_resume": True}],
    "WidthChoice": [{"ratio": 1.0}, {"only": "mlp", "head_unit": "query-heads"}, {"only": "heads", "multiple_of": 8}],
    "WriteOptions": [{"force": "yes"}],
}


@pytest.mark.fault(109)
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_a_record_that_is_made_by_hand_refuses_in_the_words_of_python(record: type) -> None:
    assert issubclass(record, Options), f"{record.__name__} extends Options, as every record of options"
    for given in REFUSED[record.__name__]:
        with pytest.raises(UsageError) as caught:
            record(**given)
        assert "--" not in str(caught.value)
        assert any(name in str(caught.value) for name in given)


def test_a_record_takes_what_a_stage_takes_as_a_keyword() -> None:
    assert shortstack.BlockChoice(blocks=[10, 11]) == shortstack.BlockChoice(blocks="10,11")
    assert shortstack.TextOptions(data=[Path("a.txt"), "b.txt"], seq_len=128).data == "a.txt,b.txt"
    assert shortstack.RowSteps(tokens=10_000).tokens == "10000"
    assert shortstack.ScoreOptions(dtype=torch.float32).dtype == "float32"


def test_on_the_command_line_the_same_record_names_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert run(["retrain", "lora", "embedded", "--data", "embedded", "--out", out, "--rank", "0"]) == 2
    assert capsys.readouterr().err == "error: --rank 0: expected at least 1\n"
    assert run(["prune-width", "embedded", "--out", out, "--only", "mlp", "--head-unit", "query-heads"]) == 2
    assert "--head-unit: no effect with --only mlp" in capsys.readouterr().err
