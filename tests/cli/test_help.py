"""Help: plain, within 80 columns, in whole sentences, the same however it is asked for."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from shortstack.cli.app import run
from shortstack.cli.help import BESIDE, EVERYWHERE, command_help, grouped, help_of, shell_lines, typed
from shortstack.registry import COMMANDS, GROUPS

PAGES = ["", *GROUPS, *COMMANDS, *BESIDE]
OPTIONS = [(name, option) for name, command in COMMANDS.items() for option in command.options]


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_into_eighty_columns_without_boxes(page: str) -> None:
    shown = help_of(page.split())
    assert [line for line in shown.splitlines() if len(line) > 80 or line != line.rstrip()] == []
    assert not set(shown) & set("╭╮╰╯│─┃━<>")
    assert shown.startswith("Usage: shortstack ")


@pytest.mark.parametrize("page", PAGES)
def test_help_is_one_text_however_it_is_asked_for(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = page.split()
    ways = [[*words, "--help"], [*words, "-h"], ["--help", *words], ["help", *words], ["--json", *words, "--help"]]
    ways += [words] if page in ("", *GROUPS) else []
    texts = set()
    for argv in ways:
        assert run(argv) == 0, argv
        texts.add(capsys.readouterr().out)
    assert texts == {help_of(words) + "\n"}


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_the_help_of_an_option_is_whole_sentences(name: str, option: str) -> None:
    """That stand alone: nothing that continues the option's name, such as `of the adapter`."""
    text = COMMANDS[name].options[option].help
    assert text[0].isupper(), text
    assert text.endswith("."), text
    assert len(text.split()) >= 3 or text.startswith("Push."), text
    assert not text.startswith(("Of ", "And ", "With ", "By default ")), text
    assert "--" not in text, f"{text}: name options as Python does, `out` or `merge=False`"


@pytest.mark.parametrize("name", COMMANDS)
def test_words_are_not_broken_and_options_are_named_as_they_are_typed(name: str) -> None:
    command = COMMANDS[name]
    words = set(" ".join(command_help(command).split()).split(" "))
    for option in command.options.values():
        text = typed(option.help, command.options)
        assert [word for word in text.split() if word not in words] == []
        assert not re.findall(rf"`(?:{'|'.join(command.options)})`", text), text


def test_an_option_in_a_text_becomes_what_is_typed() -> None:
    options = COMMANDS["retrain lora"].options
    assert typed("see `out`, `merge=False`, `eval_data` and `other`", options) == (
        "see --out, --no-merge, --eval-data and `other`"
    )
    assert typed("with `until='stable'`", COMMANDS["score"].options) == "with --until stable"


@pytest.mark.parametrize("name", COMMANDS)
def test_options_stand_under_headings_those_of_every_command_last(name: str) -> None:
    command = COMMANDS[name]
    found = grouped(command)
    assert sorted(option.name for _, options in found for option in options) == sorted(command.options)
    headings = re.findall(r"^([A-Z].*):$", command_help(command), re.MULTILINE)
    assert headings[-1] == "General options"
    assert len(set(headings)) == len(headings)
    last = command_help(command).rpartition("General options:\n")[2]
    assert [one for one in EVERYWHERE if f"  {one} " not in last] == []
    for _, options in found:
        assert len(options) <= 20
    for option in command.options.values():
        assert option.positional or option.dashed in command_help(command)


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_shows_the_examples_of_its_commands(group: str) -> None:
    shown = " ".join(help_of([group]).replace("\\\n", " ").split())
    for name, command in COMMANDS.items():
        assert (command.example in shown) == name.startswith(f"{group} ")


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_can_be_copied_over_lines(name: str) -> None:
    lines = shell_lines(COMMANDS[name].example)
    assert " ".join(lines.replace("\\\n", "").split()) == COMMANDS[name].example
    assert all(line.endswith(" \\") for line in lines.splitlines()[:-1])


@pytest.mark.parametrize(
    ("line", "error", "hint"),
    [
        ("help scroe", 'unknown command "scroe"', "did you mean score?"),
        ("help eval pll", 'unknown command "pll"', "did you mean ppl?"),
        ("xyz --help", 'unknown command "xyz"', "shortstack help"),
    ],
)
def test_help_of_what_does_not_exist(line: str, error: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line.split()) == 2
    assert capsys.readouterr().err == f"error: {error}\nhint: {hint}\n"


def test_no_switch_comes_with_its_opposite_unless_it_decides_both_ways() -> None:
    assert "--no-quiet" not in help_of(["score"])
    assert "--plus, --no-plus" in help_of(["score"])
    assert "--merge, --no-merge" in help_of(["retrain", "lora"])


def test_help_and_version_need_no_library() -> None:
    """They are there at once: neither the command line library nor what draws on terminals is imported, let alone torch."""
    code = (
        "import sys; from shortstack.cli.app import run\n"
        "assert [run(words.split()) for words in ('', '--version', 'eval', 'help score')] == [0] * 4\n"
        "sys.exit(str({'cyclopts', 'rich', 'torch', 'transformers', 'numpy', 'tqdm'} & set(sys.modules) or '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
