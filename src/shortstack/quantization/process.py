"""Run the worker: a process of its own, whose log is not the user's, and whose errors are said in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError, UsageError
from shortstack.quantization.worker import Job

_PACKAGES = Path(__file__).resolve().parents[2]  # where shortstack is imported from
_LOG_LINES = 20


def run_worker(job: Job, *, source: str, device: str, advance: Callable[[int], object]) -> dict[str, Any]:
    """Do a job in a process of its own, and give its report.

    Args:
        job: all but the file for the report.
        source: what errors call the model.
        device: `cpu`, `cuda`, `cuda:N` or `auto`.
        advance: called with the number of matrices that have just been quantized.

    Raises:
        ShortstackError: it failed, or was killed.
        OSError: the output could not be written.
    """
    with tempfile.TemporaryDirectory(prefix="shortstack-quantize-") as folder:
        report, log = Path(folder) / "report.json", Path(folder) / "log"
        path = Path(folder) / "job.json"
        replace(job, report=str(report)).save(path)
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "shortstack.quantization.worker", str(path)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=_environment(device),
            )  # fmt: skip
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.strip().isdigit():  # other libraries print there, too
                        advance(int(line))
                code = process.wait()
            finally:
                process.kill()
                process.communicate()
        if not report.is_file():
            raise _ended(source, code, log)
        found: dict[str, Any] = json.loads(report.read_text())
    if "error" in found:
        raise _failed(source, found["error"]) from RuntimeError(found["traceback"])
    return found


def _environment(device: str) -> dict[str, str]:
    """The process's own: the model is local, and it sees the device that was chosen."""
    paths = [str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
    chosen = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        chosen["CUDA_VISIBLE_DEVICES"] = ""
    elif device.startswith("cuda:"):
        number = int(device.partition(":")[2])
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        chosen["CUDA_VISIBLE_DEVICES"] = visible[number] if visible != [""] and number < len(visible) else str(number)
    return {**os.environ, **chosen}


def _ended(source: str, code: int, log: Path) -> ShortstackError:
    """The error for a process that left no report."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if code == -signal.SIGKILL:
        return ShortstackError(
            f"{source}: the process that quantizes was killed; there may be too little memory",
            hint="use fewer --samples, or a shorter --seq-len",
        )
    last = lines[-1] if lines else "it printed nothing"
    error = ShortstackError(f"{source}: the process that quantizes ended with code {code}: {last[:300]}")
    error.__cause__ = RuntimeError("\n".join(lines[-_LOG_LINES:]))
    return error


def _failed(source: str, error: dict[str, Any]) -> Exception:
    """What the process reports, as an error of this one."""
    kind, says = error["kind"], error["says"]
    if error["errno"] is not None:
        return OSError(error["errno"], os.strerror(error["errno"]))
    if kind in ("ShortstackError", "UsageError"):
        return (UsageError if kind == "UsageError" else ShortstackError)(says, hint=error["hint"])
    if "memory" in says.lower():
        return ShortstackError(f"{source}: out of memory: {says}", hint="use fewer --samples, or a shorter --seq-len")
    return ShortstackError(
        f"{source}: llm-compressor cannot quantize it: {kind}: {says}",
        hint="try another --scheme; --debug shows the traceback",
    )
