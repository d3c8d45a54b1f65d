"""A command is one row: one that a test registers is everywhere, without a line anywhere else."""

from __future__ import annotations

import importlib.util
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import shortstack
from shortstack.cli.app import run
from shortstack.common.options import stage
from shortstack.common.shown import Shown
from shortstack.errors import UsageError
from shortstack.recipes.dry_run import Rehearsal
from shortstack.recipes.schema import json_schema
from shortstack.registry import COMMANDS, Command
from tests.test_docs import load_maker


@dataclass(frozen=True)
class Colour:
    """How it is painted.

    Attributes:
        hue: the colour.
        coats: how many times.
    """

    hue: str = "red"
    coats: int = 1


@dataclass(frozen=True, repr=False)
class Painted(Shown):
    text: str

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, "text": self.text}

    def to_text(self) -> str:
        return self.text


_COLOUR = Colour()


@stage
def paint(model: str, *, out: Path | None = None, colour: Colour = _COLOUR) -> Painted:
    """Paint a checkpoint.

    Args:
        model: which.
        out: write it here.
        colour: how.
    """
    painted = Painted(f"{Path(model).name} in {colour.coats} coats of {colour.hue}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(painted.text)
    return painted


def check_paint(values: dict[str, Any]) -> list[str]:
    if values.get("hue") == "none":
        raise UsageError("hue none: expected a colour")
    return [f"there may be no {values.get('hue', 'red')} left"]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Command:
    row = Command(
        "paint",
        "tests.test_registry:paint",
        "Paint a checkpoint.",
        "shortstack paint MODEL --hue green",
        makes={"text": "painted.txt"},
        needs=("json",),
        extra="paint",
        check="tests.test_registry:check_paint",
    )
    monkeypatch.setitem(COMMANDS, "paint", row)
    return row


@pytest.mark.usefixtures("toy")
def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert "Paint a checkpoint." in capsys.readouterr().out
    assert run(["paint", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--coats" in shown
    assert "how many times." in shown
    assert "Example:\n  shortstack paint MODEL --hue green\n" in shown
    assert run(["paint", "somewhere/m", "--hue", "green", "--coats", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "m in 2 coats of green"


@pytest.mark.usefixtures("toy")
def test_in_python() -> None:
    assert shortstack.paint("m", coats=3).text == "m in 3 coats of red"  # type: ignore[attr-defined]
    assert shortstack.paint("m", colour=Colour("blue"), coats=3).text == "m in 3 coats of blue"  # type: ignore[attr-defined]
    assert list(inspect.signature(paint).parameters) == ["model", "out", "hue", "coats"]
    with pytest.raises(TypeError, match="has no option 'coat'; did you mean coats"):
        paint("m", coat=3)


@pytest.mark.usefixtures("toy")
def test_in_recipes(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: embedded\nsteps:\n  paint: {hue: green}\n")
    assert set(json_schema()["$defs"]["paint"]["properties"]) == {"stage", "optional", "model", "hue", "coats"}
    foreseen = shortstack.run(str(recipe), out=tmp_path / "out", dry_run=True)
    assert isinstance(foreseen, Rehearsal)
    assert (foreseen.problems, foreseen.notes) == ([], ["there may be no green left"])
    shortstack.run(str(recipe), out=tmp_path / "out", quiet=True)
    assert (tmp_path / "out/paint/painted.txt").read_text().endswith("in 1 coats of green")
    refused = shortstack.run(str(recipe), out=tmp_path / "other", set_=["paint.hue=none"], dry_run=True)
    assert isinstance(refused, Rehearsal)
    assert refused.problems == ["paint: hue none: expected a colour"]


@pytest.mark.usefixtures("toy")
def test_in_the_documents() -> None:
    page = load_maker().commands_page()
    assert "## paint" in page
    assert "| `--coats` | `1` | how many times. |" in page


@pytest.mark.usefixtures("toy")
def test_a_missing_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "json" else real(name))
    assert run(["paint", "m"]) == 2
    assert capsys.readouterr().err == "error: paint needs json\nhint: pip install 'shortstack[paint]'\n"
    with pytest.raises(UsageError, match="paint needs json"):
        shortstack.paint("m")  # type: ignore[attr-defined]
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: embedded\nsteps:\n  paint: {hue: green}\n")
    foreseen = shortstack.run(str(recipe), out=tmp_path / "out", dry_run=True)
    assert isinstance(foreseen, Rehearsal)
    assert "paint: needs json (pip install 'shortstack[paint]')" in foreseen.problems


def test_no_stage_takes_more_than_a_handful() -> None:
    """What is more belongs in records (CONTRIBUTING.md)."""
    for command in COMMANDS.values():
        own = inspect.signature(inspect.unwrap(command.stage)).parameters
        assert len(own) <= 8, f"{command.name} takes {len(own)}"


def test_no_name_of_a_command_is_compared_outside_its_room() -> None:
    """Recipes, command line and documents know a command by its row."""
    import ast

    root = Path(shortstack.__file__).parent
    for path in [*(root / "recipes").rglob("*.py"), *(root / "cli").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                compared = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant)]
                assert not set(compared) & set(COMMANDS), f"{path}:{node.lineno}"


def test_no_function_has_the_name_of_a_room() -> None:
    """`shortstack.demo` would be the function at first, and the package as soon as that is imported."""
    rooms = {path.name.removesuffix(".py") for path in Path(str(shortstack.__file__)).parent.iterdir()}
    assert rooms & set(shortstack.__all__) == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_whatever_takes_a_model_can_follow_links(name: str) -> None:
    """CONTRIBUTING.md: an error about a link recommends `--allow-links`, so every such command has it."""
    options = COMMANDS[name].options
    takes_a_model = {"model", "models", "teacher", "adapter"} & {one.name for one in options.values() if one.positional}
    recipes_decide = "recipe" in options
    assert not takes_a_model or recipes_decide or "allow_links" in options, f"{name} takes a model, but no allow_links"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_function_of_a_command_is_a_stage(name: str) -> None:
    """Without `@stage` its options are not checked when Python calls it."""
    assert hasattr(COMMANDS[name].stage, "__wrapped__"), (
        f"{name}: decorate its function with @stage (common/options.py)"
    )
