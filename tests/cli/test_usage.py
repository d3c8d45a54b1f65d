"""A mistyped option, command or choice: the nearest that exists, in two lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from shortstack.cli.app import run
from shortstack.cli.usage import _typed
from shortstack.registry import COMMANDS

MISTYPED = [
    ("score embedded --critreion ppl", "unknown option: --critreion", "did you mean --criterion?"),
    ("prune embedded --verfiy", "unknown option: --verfiy", "did you mean --verify?"),  # --out is missing, too
    ("retrain lora embedded --dat x --out y", "unknown option: --dat", "did you mean --data?"),
    ("prune embedded --blocks 1", "prune: --out is missing", "such as --out PRUNED"),
    ("prune embedded --blocks 1 --out", "prune: --out needs a value", "such as --out PRUNED"),
    ("prune embedded --no-plus --blocks 1", "prune: --out is missing", "such as --out PRUNED"),
    ("retrain lora PRUNED --out y", "retrain lora: --data is missing", "such as --data rows.json"),
    ("score", "score: MODEL is missing", f"such as {COMMANDS['score'].example}"),
    (
        "prune embedded plan.json --out x",
        "argument: plan.json",
        "prune takes MODEL alone; did you mean --plan plan.json?",
    ),
    ("quickstart x", "unexpected argument: x", "quickstart takes no argument (shortstack quickstart --help)"),
    ("score embedded --quiet --no-quiet", "unknown option: --no-quiet", "did you mean --quiet?"),
    ("run vicuna-6b-ppl", "no recipe named 'vicuna-6b-ppl'", "did you mean vicuna-7b-ppl?"),
    ("info embedded --device gpu", "unknown option: --device", "shortstack info --help"),
    ("check embedded --quick --qiuet", "unknown option: --qiuet", "did you mean --quiet?"),
    ("score embedded --device gpu", "--device gpu: unknown", "did you mean cuda?"),
    ("score embedded --until stable", "--until stable needs the number of blocks", "such as --remove 6"),
    (
        "score embedded --plus",
        "--plus: no effect without --until stable",
        "leave it out; use it with plan or prune",
    ),
    ("run x --set", "run: --set needs a value", f"such as {COMMANDS['run'].example}"),
    ("score embedded --samples", "score: --samples needs a value", "such as --samples 10"),
    ("--verison", "unknown option: --verison", "did you mean --version?"),
    ("eval --jsno", "unknown option: --jsno", "did you mean --json?"),
    ("eval frob", 'unknown command "frob"', "known: ppl, zeroshot, generation, samples, all"),
    ("scroe embedded", 'unknown command "scroe"', "did you mean score?"),
    ("retrain lroa embedded", 'unknown command "lroa"', "did you mean lora?"),
    ("score embedded more", "unexpected argument: more", "score takes MODEL alone (shortstack score --help)"),
    ("score embedded --sampling publishd", 'invalid value "publishd" for --sampling', "did you mean published?"),
    ("score embedded --dtype float23", 'invalid value "float23" for --dtype', "did you mean float32?"),
    ("plan embedded --strategy oneshot --blocks 1", 'invalid value "oneshot"', "did you mean one-shot?"),
    ("score embedded --device cdua", "--device cdua: unknown", "did you mean cuda?"),
    ("score embedded --criterion pll", "unknown criterion 'pll'", "did you mean ppl?"),
    ("score embedded --criterion taylor:wieght=sum", "no parameter 'wieght'", "did you mean weight?"),
    ("score embedded --criterion taylor:weight=summ", "weight=summ", "did you mean sum?"),
    ("eval zeroshot embedded --tasks boolqq --tasks-dir .", "no local file format of boolqq", "did you mean boolq?"),
    ("eval ppl embedded --data wikitext", "wikitext: no such file or folder", "did you mean wikitext2?"),
    ("score embedded --data embeded", "embeded: no such file or folder", "did you mean embedded?"),
    ("info embeded", "embeded: no such directory", "did you mean embedded?"),
    ("run quickstart --set score.sampling=publishd --dry-run", "sampling is 'publishd'", "did you mean published?"),
]


@pytest.mark.fault(109)
@pytest.mark.parametrize(("line", "error", "hint"), MISTYPED, ids=[line for line, _, _ in MISTYPED])
def test_the_nearest_is_named(
    line: str,
    error: str,
    hint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(line.split()) in (1, 2)
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert first.startswith("error: ")
    assert error in first
    assert second == f"hint: {hint}"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("score embedded --samples x", "--samples x: expected a whole number"),
        ("plan embedded --ratio 0,2", "--ratio 0,2: expected a number"),
        ("plan embedded --plus=maybe", "--plus maybe: expected True or False"),
        ("eval ppl embedded --batch x", "--batch x: expected a whole number or auto"),
        ("score embedded --quiet=3", "--quiet 3: expected True or False"),
    ],
)
def test_a_value_of_another_kind(line: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line.split()) == 2
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_that_lacks_a_letter_is_recognized(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in _typed(command)[3:]:
        if len(option) > 6:
            mistyped = option[:-2] + option[-1]
            if mistyped in _typed(command):
                continue
            assert run([*command.split(), mistyped, "x"]) == 2, option
            assert capsys.readouterr().err.splitlines()[-2:] == [
                f"error: unknown option: {mistyped}",
                f"hint: did you mean {option}?",
            ]
