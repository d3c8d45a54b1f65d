"""Options of stages: what callers in Python see, and what a developer is told who forgets something."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest

from shortstack.common.options import call_with, options_of, stage
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


def test_the_docstring_has_the_fields_in_the_place_of_their_record() -> None:
    shown = inspect.getdoc(painted) or ""
    assert shown.splitlines()[2:] == [
        "Args:",
        "    what: which.",
        "    more: others.",
        "    hue: the colour, which",
        "        is long to explain.",
        "    coats: how many times.",
        "    paint: a `Paint` that holds `hue` to `coats`; these override it.",
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
