"""Commands in documents, run as a reader would: in order, in one folder, with the files that the text speaks of."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shortstack.cli.app import run
from shortstack.registry import COMMANDS, GROUPS
from tests.kills import recorded_hashes

_FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]*) -->\n)?```(?P<kind>\w+)?(?P<more>[^\n]*)\n(?P<body>.*?)\n```", re.DOTALL
)
# Verb -> what makes it short. What a reader sees is what a reader would type; what is added changes sizes alone.
_SHORTER = {
    "retrain lora": [
        "--max-steps",
        "1",
        "--batch",
        "2",
        "--micro-batch",
        "2",
        "--validation",
        "2",
        "--eval-windows",
        "2",
    ],
    "retrain cpt": ["--max-steps", "1", "--batch", "2", "--micro-batch", "2", "--validation", "2", "--seq-len", "32"],
    "retrain distill": ["--max-steps", "1", "--batch", "2", "--micro-batch", "2", "--validation", "2"],
    "retrain local": ["--tokens", "128", "--batch", "2", "--micro-batch", "2", "--validation", "2", "--seq-len", "32"],
    "score": ["--samples", "4"],
    "search": ["--samples", "3"],
    "stability": ["--samples", "4"],
    "prune-width": ["--samples", "4"],
    "repair": ["--samples", "4", "--seq-len", "32"],
    "quantize": ["--samples", "4", "--seq-len", "32"],
    "teach": ["--tokens", "200", "--seq-len", "32", "--validation", "1"],
    "eval zeroshot": ["--limit", "2"],
    "eval all": ["--limit", "2"],
    "eval generation": ["--new-tokens", "4", "--probes", "1"],
    "eval samples": ["--new-tokens", "4"],
    "eval ppl": ["--seq-len", "32"],
    "bench": ["--runs", "3", "--warmup", "1", "--new-tokens", "8"],
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a document.

    Attributes:
        kind: sh, python, yaml, text.
        body: its lines.
        title: the file that it stands for.
        reason: why it is not run; None for one that is.
        line: where it begins.
    """

    kind: str
    body: str
    title: str
    reason: str | None
    line: int


def blocks(path: Path) -> Iterator[Block]:
    """All fenced blocks of a Markdown file, in order."""
    text = path.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        title = re.search(r'title="([^"]+)"', match["more"])
        line = text.count("\n", 0, match.start()) + 1
        yield Block(match["kind"] or "", match["body"], title[1] if title else "", match["reason"], line)


def run_document(path: Path) -> tuple[int, list[str]]:
    """Run every block of a document in the folder that the process is in.

    Returns:
        The number of commands that were run, and those that need packages which are not installed, or what these make.
    """
    count = 0
    left_out: dict[str, str] = {}
    for block in blocks(path):
        place = f"{path.name}, line {block.line}"
        if block.reason is not None:
            assert len(block.reason) > 10, f"{place}: say why it is not run"
            continue
        if block.kind == "sh":
            for command in _commands(block.body):
                count += run_command(command, place, left_out)
        elif block.kind == "python":
            exec(compile(block.body, place, "exec"), {"__name__": "document"})
            count += 1
        elif block.title:
            Path(block.title).write_text(block.body)
        else:
            assert block.kind == "text", f"{place}: a block of {block.kind or 'no kind'} that nobody runs"
    return count, list(left_out.values())


def run_command(command: str, place: str, left_out: dict[str, str]) -> bool:
    """Run one command of a reader, made short; False where it needs a package that is not installed, or the output of one
    that does. `left_out`: output -> command, of those."""
    argv = shlex.split(command, comments=True)
    assert argv[0] == "shortstack", f"{place}: {command}: mark the block with <!-- not run: why -->"
    arguments = argv[1:]
    verb = " ".join(arguments[:2]) if arguments[0] in GROUPS else arguments[0]
    out = arguments[arguments.index("--out") + 1] if "--out" in arguments else None
    if COMMANDS[verb].missing or left_out.keys() & set(arguments):
        left_out[out or command] = command
        return False
    if out is not None and verb.startswith(("prune", "repair", "retrain", "merge", "teach", "quantize")):
        shutil.rmtree(out, ignore_errors=True)  # pages use the same names
    if out is not None and verb.startswith("export"):
        Path(out).unlink(missing_ok=True)
    code = run(_shortened(verb, arguments))
    assert code == 0, f"{place}: {command}: exit code {code}"
    if out is not None and "checkpoint" in COMMANDS[verb].makes and "--dry-run" not in arguments:
        recorded_hashes(Path(out))  # whatever writes a checkpoint records the sha256 of all that it wrote
    return True


def _shortened(verb: str, arguments: list[str]) -> list[str]:
    """With what makes it short; what a reader gives counts, but for what makes it long."""
    found = list(arguments)
    shorter = _SHORTER.get("repair" if "--repair" in arguments else verb, [])
    for name, value in zip(shorter[::2], shorter[1::2], strict=True):
        if (name == "--eval-windows" and "--eval-data" not in found) or (
            name == "--validation" and "--offline" in found
        ):
            continue  # without effect there, and refused
        if name not in found:
            found += [name, value]
        elif name in ("--max-steps", "--tokens") or (name == "--new-tokens" and verb == "bench"):
            found[found.index(name) + 1] = value
    return found


def _commands(body: str) -> list[str]:
    joined = body.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]
