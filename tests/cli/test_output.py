"""Output that cannot be written, and standard error that is gone: one line, exit code 1, no traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = f"{sys.executable} -W ignore -m shortstack"
ARGUMENTS = ["families", "info embedded --json", "--help", "score --help", "--version"]


def _shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)


@pytest.mark.fault(110)
@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize(
    ("redirection", "reason"), [(">/dev/full", "no space left on device"), (">&-", "standard output is closed")]
)
def test_output_that_is_full_or_closed(arguments: str, redirection: str, reason: str) -> None:
    done = _shell(f"{PROGRAM} {arguments} {redirection}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == f"error: the output cannot be written: {reason}"
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.fault(110)
@pytest.mark.parametrize("arguments", ["families", "families --json"])
def test_a_reader_that_has_gone(arguments: str) -> None:
    done = _shell(f"{PROGRAM} {arguments} | true; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.fault(110)
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_standard_error_that_is_full_or_closed_costs_lines_and_no_work(redirection: str) -> None:
    asked = f"{PROGRAM} plan embedded --blocks 3 --json {redirection}"  # says a line about protected blocks, or errs
    done = _shell(asked)
    assert done.returncode == 0
    assert done.stdout.startswith("{")
    wrong = _shell(f"{PROGRAM} info nowhere/at/all {redirection}")
    assert (wrong.returncode, wrong.stdout) == (1, "")  # nothing goes to standard output instead


def test_characters_that_the_terminal_lacks() -> None:
    done = _shell(f"PYTHONIOENCODING=ascii {PROGRAM} families")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
