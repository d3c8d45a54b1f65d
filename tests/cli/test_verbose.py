"""--verbose: where time goes, which files are read and written, and what libraries report; on stderr alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Built = Callable[..., Path]


def shell(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shortstack", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_time_and_files_on_stderr(built: Built, tmp_path: Path) -> None:
    model, out = built("llama"), tmp_path / "p"
    done = shell("prune", model, "--blocks", "1", "--out", out, "--verbose", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(out)
    time, read, written = re.split(r"^files (?:read|written):\n", done.stderr, flags=re.MULTILINE)
    assert time.startswith("time:\n")
    phases = dict(re.findall(r"^  (.+?)  +([\d.]+) s$", time, re.MULTILINE))
    assert {"imports", "all else", "together"} <= set(phases)
    parts = sum(float(taken) for what, taken in phases.items() if what != "together")
    assert parts == pytest.approx(float(phases["together"]), abs=0.05)
    files = {line.strip().partition(" (")[0] for line in read.splitlines()}
    assert {str(model / name) for name in ("config.json", "model.safetensors")} <= files
    files = {line.strip().partition(" (")[0] for line in written.splitlines()}
    assert files == {str(path) for path in out.rglob("*") if path.is_file()}  # by the names that they have now


def test_also_of_work_that_fails(built: Built) -> None:
    done = shell("plan", built("llama"), "--blocks", "99", "--verbose")
    assert done.returncode == 1
    assert done.stderr.startswith("time:\n")
    assert done.stderr.splitlines()[-2].startswith("error: ")


def test_nothing_of_it_without(built: Built) -> None:
    done = shell("plan", built("llama"), "--blocks", "1")
    assert (done.returncode, done.stderr) == (0, "")


def test_libraries_speak() -> None:
    """What they report is silenced, and is not with the switch."""
    code = """
import sys, warnings, os
from shortstack.cli import app
def info(model, **_):
    warnings.warn("a library reports", ImportWarning)
    print(os.environ.get("TRANSFORMERS_VERBOSITY"), file=sys.stderr)
from shortstack.common.command import Command
Command.call = lambda self, values: info(**values)
sys.exit(app.run(sys.argv[1:]))
"""
    plain = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    silent, loud = (
        subprocess.run([sys.executable, "-c", code, "info", "M", *more], capture_output=True, text=True, env=plain)
        for more in ([], ["--verbose"])
    )
    assert "error" in silent.stderr
    assert "a library reports" not in silent.stderr
    assert "a library reports" in loud.stderr
    assert "None" in loud.stderr
