"""Processes that are killed or share a run: forked from a warmed process; and whole commands.

`python -m tests.kills` is the warmed process: it has everything imported, and forks a child for each job that it reads
from its standard input, or several that find each other as torchrun's do. A child kills itself with SIGKILL in the middle
of its n-th write, or its parent does so.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.retraining.processes import free_port

ROOT = Path(__file__).resolve().parents[1]
_LONGEST_SECONDS = 240  # a process that hangs is killed, which the test sees


class Warm:
    """The warmed process, seen from the tests.

    Args:
        modules: what it imports besides what every command needs.
    """

    def __init__(self, *modules: str) -> None:
        self._modules = modules

    def __enter__(self) -> Warm:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.kills", *self._modules],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert self._read() == {"ready": True}
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def run(
        self,
        argv: list[str],
        log: Path,
        *,
        kill_at: int | None = None,
        delay: float | None = None,
        sign: Path | None = None,
        said: str | None = None,
        piece: int = 8192,
        processes: int = 1,
        module: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Run a command in a fork: {"code": exit code or -9, "writes": how many it made}.

        It is killed in its `kill_at`-th write, after `delay` seconds, once the file `sign` is there, or once it has `said`
        something. With several `processes` all of them are killed, and the code is that of the first that ends with one.
        `main` of `module` is called in place of the command line.
        """
        assert self._process.stdin is not None
        job = {"argv": argv, "log": str(log), "kill_at": kill_at, "delay": delay, "piece": piece, "said": said}
        job |= {"processes": processes, "module": module, "environment": dict(environment or {})}
        job["sign"] = None if sign is None else str(sign)
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found


def hashes(folder: Path) -> dict[str, str]:
    """Every file of a folder, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def recorded_hashes(out: Path) -> dict[str, str]:
    """What shortstack.json of an output records, once it is found to be every other file with the sha256 that it has."""
    recorded: dict[str, str] = json.loads((out / "shortstack.json").read_bytes())["files"]
    assert recorded == {name: digest for name, digest in hashes(out).items() if name != "shortstack.json"}
    return recorded


@dataclass
class Sweep:
    """One command, killed again and again; what must hold afterwards is checked each time.

    Attributes:
        warm: the warmed process.
        model: the input, which must stay as it is.
        folder: where the output goes; emptied before each kill.
        argv: the command, with its output in `folder`.
        output: the output's name in `folder`.
        figures: what of the output must be the same whatever happened before.
    """

    warm: Warm
    model: Path
    folder: Path
    argv: list[str]
    output: str
    figures: Callable[[Path], Any]
    kills: int = 0
    completed: int = 0

    def __post_init__(self) -> None:
        self._input = hashes(self.model)
        self._log = self.folder.parent / "log.txt"
        self.empty()
        done = self.warm.run(self.argv, self._log)
        assert done["code"] == 0, self._log.read_text()
        self.writes: int = done["writes"]
        self._expected = self.figures(self.folder / self.output)

    def kill(self, **how: Any) -> None:
        """Kill it once, and look: input unchanged, output absent or complete, and the next run succeeds."""
        self.empty()
        done = self.warm.run(self.argv, self._log, **how)
        self.kills += done["code"] == -signal.SIGKILL
        self.completed += done["code"] == 0
        assert done["code"] in (0, -signal.SIGKILL), self._log.read_text()
        self.check_and_run_again()

    def check(self) -> None:
        """The input is unchanged, and the output absent or complete."""
        assert hashes(self.model) == self._input, "the input was touched"
        target = self.folder / self.output
        if target.exists():
            assert self.figures(target) == self._expected, "an output that is not complete"

    def check_and_run_again(self) -> None:
        """What must hold after a kill, however it was made, and that the next run succeeds."""
        self.check()
        target = self.folder / self.output
        again = [*self.argv, *(["--force"] if target.is_dir() else [])]
        done = self.warm.run(again, self._log)
        shown = self._log.read_text()
        assert done["code"] == 0, shown
        assert "Traceback" not in shown
        assert self.figures(target) == self._expected
        left = sorted(path.name for path in self.folder.iterdir())
        assert left == [self.output], f"left over: {left}"

    def empty(self) -> None:
        """Take everything out of the output's folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)


def prune_sweep(warm: Warm, model: Path, folder: Path) -> Sweep:
    """`shortstack prune`, whose output must be the same to the byte."""
    argv = ["prune", str(model), "--blocks", "1,3", "--out", str(folder / "out"), "--quiet"]
    return Sweep(warm, model, folder, argv, "out", hashes)


def score_sweep(warm: Warm, model: Path, folder: Path, windows: Path) -> Sweep:
    """`shortstack score`, whose scores must be the same bit for bit; a state is saved after every block."""
    out = folder / "scores.json"
    argv = [
        "score", str(model), "--data", str(windows), "--samples", "4", "--criterion", "ppl,taylor,magnitude",
        "--out", str(out), "--save-every", "0", "--quiet",
    ]  # fmt: skip

    def figures(path: Path) -> Any:
        record = json.loads(path.read_text())
        return {key: record[key] for key in ("model", "calibration", "criteria")}

    return Sweep(warm, model, folder, argv, "scores.json", figures)


def kill_command(argv: list[str], seconds: float) -> int:
    """Start the whole command as a process, kill it after a while; its exit code (-9 where the kill came in time)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "shortstack", *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


# ---- the warmed process


def main() -> None:
    """Import everything, then fork a child per job."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: F401

    import shortstack.engine.select
    import shortstack.engine.streamed
    import shortstack.pruning.prune
    import shortstack.scoring.score  # noqa: F401

    for module in sys.argv[1:]:
        importlib.import_module(module)
    torch.set_num_threads(1)
    gc.freeze()  # what is imported is nothing that a child's garbage collection has to look at, or to copy
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_forked(json.loads(line))), flush=True)
    os._exit(0)  # nothing has to be taken down, which takes a busy machine a while


def _forked(job: dict[str, Any]) -> dict[str, Any]:
    Path(job["log"]).write_bytes(b"")
    environments = [job["environment"]]
    if job["processes"] > 1:
        port, world = str(free_port()), str(job["processes"])
        environments = [
            {**job["environment"], "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            for rank in range(job["processes"])
        ]  # fmt: skip
    reader, writer = os.pipe()
    pids = [_started({**job, "environment": environment}, reader, writer) for environment in environments]
    os.close(writer)
    if job["delay"] is not None:
        time.sleep(job["delay"])
        os.kill(pids[0], signal.SIGKILL)
    code = _ended(job, pids)
    with os.fdopen(reader) as stream:
        told = stream.read()
    return {"code": code, "writes": int(told or 0) if len(pids) == 1 else 0}


def _started(job: dict[str, Any], reader: int, writer: int) -> int:
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 70
        try:
            code = _child(job, writer)
        finally:
            os._exit(code)
    return pid


def _ended(job: dict[str, Any], pids: list[int]) -> int:
    """The exit code of the first that fails, whose companions are ended, as torchrun does; all are killed at the sign."""
    found, left, last = 0, set(pids), time.monotonic() + _LONGEST_SECONDS
    while left:
        if found or _has_sign(job) or time.monotonic() > last:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            time.sleep(0.002)
            continue
        left.discard(pid)
        found = found or os.waitstatus_to_exitcode(status)
    return found


def _has_sign(job: dict[str, Any]) -> bool:
    if job["sign"] and os.path.exists(job["sign"]):
        return True
    return bool(job["said"]) and job["said"] in Path(job["log"]).read_text()


def _child(job: dict[str, Any], told: int) -> int:
    from shortstack.checkpoint import byte_copy as copying
    from shortstack.checkpoint import pieces
    from shortstack.cli.app import run

    log = os.open(job["log"], os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(job["environment"])
    copying.PIECE = pieces.PIECE = job["piece"]
    copying._SYNC_EVERY = 4 * job["piece"]
    count = _killing_at(job["kill_at"])
    if job["module"]:
        sys.argv = [job["module"], *job["argv"]]
        code = importlib.import_module(job["module"]).main()
    else:
        code = run(job["argv"])
    sys.stdout.flush()
    os.write(told, str(count[0]).encode())
    return int(code)


def _killing_at(nth: int | None) -> list[int]:
    """Count what changes the disk; at the n-th, do half of it and die."""
    count = [0]

    def wrap(owner: Any, name: str, half: Callable[..., Any] | None = None) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == nth:
                if half is not None:
                    half(real, *args)
                elif count[0] % 2:
                    real(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, counted)

    wrap(os, "pwrite", lambda real, fd, data, offset: real(fd, data[: len(data) // 2], offset))
    wrap(os, "fsync")
    wrap(os, "fdatasync")
    for name in ("rename", "replace", "mkdir", "unlink"):
        wrap(Path, name)
    for name in ("write_text", "write_bytes"):
        wrap(Path, name, lambda real, path, data, *_: real(path, data[: len(data) // 2]))
    wrap(shutil, "rmtree")
    return count


if __name__ == "__main__":
    main()
