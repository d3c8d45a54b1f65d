"""Completion, in a real bash: commands, options, choices and paths."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from shortstack.cli.app import command_line, run
from shortstack.cli.commands import COMPLETED
from shortstack.cli.completion import completion

# Completes a line as bash does when Tab is pressed: by the function that was registered for the command.
_DRIVER = """
source "$1"
line=$2
read -ra COMP_WORDS <<< "$line"
[[ $line == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_LINE=$line COMP_POINT=${#line}
registered=$(complete -p shortstack)
[[ $registered =~ -F\\ ([^ ]+) ]] && "${BASH_REMATCH[1]}" shortstack "${COMP_WORDS[COMP_CWORD]}" ""
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "shortstack.bash"
    path.write_text(completion(command_line(COMPLETED), "bash", install=False).to_text())
    return path


def completed(script: Path, line: str) -> list[str]:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    done = subprocess.run([bash, "-c", _DRIVER, "-", str(script), line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("shortstack sco", ["score"]),
        ("shortstack eval ", ["ppl", "zeroshot", "generation", "samples", "all"]),
        ("shortstack eval z", ["zeroshot"]),
        ("shortstack score M --sampl", ["--samples", "--sampling"]),
        ("shortstack score M --sampling ", ["documents", "published", "joined"]),
        ("shortstack score M --sampling p", ["published"]),
        ("shortstack plan M --no-pl", ["--no-plus"]),
        ("shortstack plan M --plus --strategy c", ["contiguous"]),  # what stands behind a switch is not its value
        ("shortstack plan M --verb", ["--verbose"]),
        ("shortstack help sco", ["score"]),
        ("shortstack completion ", ["bash", "zsh", "fish"]),
    ],
)
def test_bash_completes(script: Path, line: str, found: list[str]) -> None:
    assert completed(script, line) == found


def test_bash_completes_every_command_and_paths(script: Path, tmp_path: Path) -> None:
    from shortstack.registry import COMMANDS

    assert {name.partition(" ")[0] for name in COMMANDS} | {"help", "completion"} == set(
        completed(script, "shortstack ")
    )
    (tmp_path / "plan-of-mine.json").touch()
    found = completed(script, f"shortstack prune M --plan {tmp_path}/plan-o")
    assert found == [f"{tmp_path}/plan-of-mine.json"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_installed_and_printed(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", f"/bin/{shell}")
    monkeypatch.delenv("ZSH_CUSTOM", raising=False)
    monkeypatch.delenv("ZSH", raising=False)
    assert run(["completion"]) == 0
    printed = capsys.readouterr().out
    assert run(["completion", "--install"]) == 0
    path = Path(capsys.readouterr().out.partition(":")[0])
    assert tmp_path in path.parents
    assert path.read_text() in (printed, printed.removesuffix("\n"))


@pytest.mark.parametrize(
    ("shell", "found"), [("", "SHELL is not set"), ("/bin/tcsh", "SHELL is 'tcsh'")], ids=["none", "unknown"]
)
def test_a_shell_that_is_not_known(
    shell: str, found: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHELL", shell)
    assert run(["completion"]) == 2
    assert (
        capsys.readouterr().err
        == f"error: completion: the shell is not known: {found}\nhint: name it: bash, zsh, fish\n"
    )


def test_a_home_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".local").write_text("a file in the way")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(["completion", "bash", "--install"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: ")
    assert "cannot be written" in lines[0]
