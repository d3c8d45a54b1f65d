"""Runs of several processes on this machine: torchrun and accelerate, over gloo, as a user starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]


def launched(
    kind: str, processes: int, arguments: Sequence[str], folder: Path, *, module: str = "shortstack"
) -> subprocess.Popen[str]:
    """Start `shortstack ARGUMENTS` in so many processes: `plain`, `ddp` (torchrun) or `fsdp2` (accelerate).

    `module` is what is started instead, a module that does the same and more.
    """
    if kind == "plain":
        launcher = [sys.executable]
    elif kind == "ddp":
        launcher = [
            sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}",
            "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0",
        ]  # fmt: skip
    else:
        launcher = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(on_cpu(processes, folder)),
            "--main_process_port", str(free_port()),
        ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    command = [*launcher, "-m", module, *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def on_cpu(processes: int, folder: Path) -> Path:
    """The project's own FSDP2 configuration, for so many processes without a GPU."""
    text = (ROOT / "configs/fsdp2-8gpu.yaml").read_text()
    for before, after in (
        ("num_processes: 8", f"num_processes: {processes}"),
        ("mixed_precision: bf16", 'mixed_precision: "no"'),
        ("use_cpu: false", "use_cpu: true"),
    ):
        assert before in text
        text = text.replace(before, after)
    path = folder / f"fsdp2-{processes}.yaml"
    path.write_text(text)
    return path


def fsdp2_environment(folder: Path) -> dict[str, str]:
    """What `accelerate launch` adds to the environment of processes that it starts with that configuration."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = ["--config_file", str(on_cpu(2, folder)), "--main_process_port", str(free_port()), "-m", "shortstack"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    found: dict[str, str] = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in found.items() if os.environ.get(name) != value}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def finished(process: subprocess.Popen[str], timeout: float = 240) -> str:
    """What it said; it must have ended well."""
    said, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, said
    return said


def killed_after(process: subprocess.Popen[str], sign: Path, timeout: float = 240) -> None:
    """Kill all its processes once a file is there; the run must not have ended before."""
    ends = time.monotonic() + timeout
    while not sign.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < ends, f"{sign} did not appear"
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it was killed"
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:  # a launcher's workers are in sessions of their own
        member.kill()
    psutil.wait_procs(family[1:], timeout=30)
    process.communicate()


def losses(out: Path) -> list[float]:
    lines: list[dict[str, Any]] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
