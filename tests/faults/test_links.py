"""A checkpoint whose files are all links to files elsewhere: every command takes it with --allow-links, none without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shortstack.cli.app import run
from shortstack.registry import COMMANDS

pytestmark = [pytest.mark.fault(12), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
LONGER = {"max_position_embeddings": 512}
SHORT = "--max-steps 1 --batch 2 --micro-batch 2 --validation 2 --data ROWS --out OUT"
LINES = [
    "info FARM",
    "check FARM",
    "score FARM --seq-len 32 --samples 2",
    "plan FARM --blocks 1",
    "search FARM --remove 1 --data ROWS --samples 2 --seq-len 16",
    "stability FARM --remove 1 --criterion ppl --seeds 2 --data ROWS --samples 2 --seq-len 16",
    "curve FARM --most 1 --data ROWS --samples 2 --seq-len 16",
    "prune-width FARM --ratio 0.2 --data ROWS --samples 4 --seq-len 32 --out OUT",
    "prune FARM --blocks 1 --verify --out OUT",
    f"retrain lora FARM {SHORT}",
    f"retrain cpt FARM {SHORT} --seq-len 32",
    f"retrain distill FARM --teacher FARM {SHORT} --seq-len 32",
    "teach FARM --data ROWS --seq-len 32 --top-k 4 --out OUT",
    "eval ppl FARM --data ROWS --seq-len 32",
    "eval samples FARM --new-tokens 2",
    "eval generation FARM --new-tokens 2 --dense FARM",
    "bench FARM --new-tokens 2 --runs 1 --warmup 0",
]
# Their models are opened in the same place; `quantize`, which needs its extra, has a test of its own in tests/quantization.
LATER = {
    "merge", "repair", "retrain local", "eval zeroshot", "eval all", "quantize", "demo", "export gguf", "export mergekit",
    "export prune-layers",
}  # fmt: skip


@pytest.fixture
def farm(built: Callable[..., Path], tmp_path: Path) -> Path:
    folder = tmp_path / "farm"
    folder.mkdir()
    for file in built("llama", **LONGER).iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def test_every_command_that_takes_a_model_has_the_option() -> None:
    taking = {name for name, command in COMMANDS.items() if {"model", "models", "teacher"} & set(command.options)}
    taking = (taking | {"merge"}) - {"run"}  # a recipe never allows it: its hint says how to copy
    assert {name for name in taking if "allow_links" not in COMMANDS[name].options} == set()
    named = {next(name for name in sorted(COMMANDS, key=len, reverse=True) if line.startswith(name)) for line in LINES}
    assert taking - named <= LATER


@pytest.mark.parametrize("line", LINES)
def test_taken_with_the_option_and_refused_without(
    farm: Path, tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "some words of row {n}, and a few more of them"}}\n' for n in range(60)))
    arguments = line.replace("FARM", str(farm)).replace("ROWS", str(rows)).replace("OUT", "out").split()
    assert run(arguments) == 1
    said = capsys.readouterr()
    assert "is a link to" in said.err + said.out
    assert "outside the checkpoint" in said.err + said.out
    assert "use --allow-links" in said.err + said.out
    assert not (tmp_path / "out").exists()
    assert run([*arguments, "--allow-links"]) == 0, capsys.readouterr().err
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_symlink()]


def test_a_recipe_is_told_to_copy(farm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("steps:\n  info: {}\n")
    assert run(["run", str(recipe), "--model", str(farm), "--out", str(tmp_path / "out")]) == 1
    assert "cp -rL FOLDER COPY" in capsys.readouterr().err
