"""What a run records of a step, and what a report repeats: a command that the command line takes."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from shortstack.cli.app import command_line as program
from shortstack.publishing.report.again import commands
from shortstack.publishing.report.inputs import read_material
from shortstack.publishing.report.names import named
from shortstack.recipes.resolve import resolve
from shortstack.recipes.run_folder import command_line
from tests.publishing.report.material import folder_of_all


def parsed(line: str) -> None:
    words = shlex.split(line, comments=True)
    assert words.pop(0) == "shortstack"
    program().parse_args(words, exit_on_error=False, print_error=False)


@pytest.mark.parametrize(
    "name", ["quickstart", "any-light", "vicuna-7b-ppl", "vicuna-7b-cpt-lora-20", "vicuna-7b-gptq", "bench-vicuna-7b"]
)
def test_every_step_is_a_command(name: str) -> None:
    recipe = resolve(name, model="a folder/model")
    lines = [command_line(recipe, step) for step in recipe.steps]
    for line, step in zip(lines, recipe.steps, strict=True):
        assert line.startswith(f"shortstack {step.command.name} ")
        parsed(line)
    assert "'a folder/model'" in lines[0]
    if name == "vicuna-7b-ppl":
        assert "shortstack prune 'a folder/model' --scores score/scores.json" in lines[1]
        assert "shortstack merge lora/adapter --save-dtype float16 --base prune --out merge" in lines[3]


def test_commands_made_of_records_are_commands(tmp_path: Path) -> None:
    material = read_material([folder_of_all(tmp_path / "work")])
    lines = commands(material, named(material)[1])
    for line in lines:
        parsed(line)
    verbs = [
        line.split()[1] + (f" {line.split()[2]}" if line.split()[1] in ("eval", "retrain") else "") for line in lines
    ]
    assert verbs == ["score", "prune", "retrain lora", "bench", "eval ppl", "eval samples", "eval zeroshot"]
    assert "shortstack prune org/tiny --blocks 1 --verify --out PRUNED" in lines
    assert not [line for line in lines if str(tmp_path) in line]
