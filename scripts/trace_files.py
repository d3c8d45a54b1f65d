"""Count the files and functions of shortstack that commands execute, and the frames from a stage function to a block.

    python scripts/trace_files.py                   a table over four commands, on a pico model that it makes itself
    python scripts/trace_files.py --json            the same for machines
    python scripts/trace_files.py --list            also the files, how many of their functions were called, and the frames
    python scripts/trace_files.py --source FOLDER   of another checkout, such as a worktree of an older commit

A file counts where one of its functions is called, in any thread; that a module is imported or a class defined is no call.
Frames are those of shortstack from the stage function, which is counted, to the `forward` of a block, which is not: the most
of all calls. Products run in one thread, so that no pool hides a frame.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK = "LlamaDecoderLayer.forward"
COMMANDS = {
    "score": (
        "score",
        "score MODEL --data DATA/texts.jsonl --samples 4 --seq-len 16 --criterion ppl,taylor,magnitude --out OUT/scores.json",
    ),
    "prune --verify": ("prune", "prune MODEL --blocks 2 --out OUT/pruned --verify"),
    "retrain lora": (
        "retrain_lora",
        "retrain lora MODEL --data DATA/instructions.json --out OUT/lora --max-steps 2 --batch 2 --micro-batch 2"
        " --validation 2 --device cpu",
    ),
    "eval zeroshot": (
        "evaluate_zeroshot",
        "eval zeroshot MODEL --tasks-dir DATA/tasks --tasks arc_easy --limit 2 --out OUT/zeroshot.json --device cpu",
    ),
}


def main() -> int:
    """Trace each command in a process of its own, and print what was counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=ROOT, help="the checkout whose src/ is run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--list", action="store_true", help="also list files and frames")
    parser.add_argument("--only", choices=list(COMMANDS), help="one command")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        names = [options.only] if options.only else list(COMMANDS)
        counted = {name: traced(name, options.source.resolve(), Path(folder)) for name in names}
    if options.json:
        print(json.dumps(counted, indent=1))
        return 0
    print(f"{'command':<16} {'files':>6} {'functions':>10} {'lines of them':>14} {'frames':>7}")
    for name, found in counted.items():
        print(f"{name:<16} {found['files']:>6} {found['functions']:>10} {found['lines']:>14} {found['frames']:>7}")
        if options.list:
            for file, functions in sorted(found["by_file"].items(), key=lambda pair: (-pair[1], pair[0])):
                print(f"    {functions:>4} {file}")
            print("   ", " > ".join(found["stack"]))
    return 0


def make_inputs(folder: Path) -> None:
    """A pico Llama with a tokenizer, texts, instructions and rows of tasks."""
    sys.path.insert(0, str(ROOT))
    from tests import pico
    from tests.evaluation import material as tasks
    from tests.retraining import material as training

    pico.build(folder / "model", max_position_embeddings=512)
    training.texts(folder / "texts.jsonl")
    training.instructions(folder / "instructions.json")
    tasks.published(folder / "tasks")


def traced(name: str, source: Path, folder: Path) -> dict[str, Any]:
    """Run one command under a profile, in a process of its own."""
    stage, line = COMMANDS[name]
    report, out = folder / "report.json", folder / f"out-{stage}"
    out.mkdir()
    places = {"MODEL": f"{folder}/model", "DATA": str(folder), "OUT": str(out)}
    arguments = []
    for word in line.split():
        first, slash, rest = word.partition("/")
        arguments.append(places.get(first, first) + slash + rest)
    environment = {
        **os.environ, "PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore", "SHORTSTACK_CACHE": str(folder / f"cache-{stage}"),
    }  # fmt: skip
    command = [sys.executable, __file__, "--child", str(report), stage, str(source), *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def child(report: Path, stage: str, source: Path, arguments: list[str]) -> int:
    """Run a command here, and write what was counted."""
    inside = f"{source / 'src' / 'shortstack'}{os.sep}"
    called: set[CodeType] = set()
    deepest: list[str] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal deepest
        if event != "call":
            return
        code = frame.f_code
        if code.co_filename.startswith(inside):
            called.add(code)
        elif code.co_qualname == BLOCK:
            found = frames(frame.f_back, stage, inside)
            if len(found) > len(deepest):
                deepest = found

    sys.argv = ["shortstack", *arguments]
    threading.setprofile(profile)
    sys.setprofile(profile)
    code = 0
    try:
        runpy.run_module("shortstack", run_name="__main__")
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    by_file: dict[str, int] = {}
    for one in called:
        if one.co_flags & inspect.CO_OPTIMIZED and not one.co_name.startswith("<"):  # no module, no class body
            name = one.co_filename.removeprefix(inside)
            by_file[name] = by_file.get(name, 0) + 1
    lines = sum(len(Path(inside + name).read_text().splitlines()) for name in by_file)
    counted = {"files": len(by_file), "functions": sum(by_file.values()), "lines": lines, "frames": len(deepest)}
    report.write_text(json.dumps({**counted, "stack": deepest, "by_file": by_file}))
    return code


def frames(frame: FrameType | None, stage: str, inside: str) -> list[str]:
    """The frames of shortstack from the stage function on; none where the block was not called by it."""
    found: list[str] = []
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(inside):
            found.append(code.co_qualname)
            if code.co_name == stage:
                return found[::-1]
        frame = frame.f_back
    return []


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), sys.argv[5:]))
    sys.exit(main())
