"""The long form of the tests of faults: many random inputs, many kills. Prints one JSON line; exits 1 if anything broke.

python scripts/soak.py --examples 100000 --kills 2000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.kills import Sweep, Warm, kill_command, prune_sweep, score_sweep  # noqa: E402

VERBS = 20  # one in so many kills is of the whole command, start-up included


def examples(count: int) -> dict[str, Any]:
    """Random headers, indexes, configs, plans and tables through the command line."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "load", "tests/faults/test_properties.py"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "SHORTSTACK_EXAMPLES": str(count)})
    return {"examples": count, "examples_seconds": time.perf_counter() - started, "examples_ok": done.returncode == 0}


def kills(count: int, seed: int) -> dict[str, Any]:
    """Kill prune and score at random writes and random times; every check of `Sweep` must hold each time."""
    from tests import pico

    started = time.perf_counter()
    generator = random.Random(seed)
    killed = commands = finished = 0
    with tempfile.TemporaryDirectory() as name, Warm() as warm:
        folder = Path(name)
        windows = folder / "w.jsonl"
        windows.write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in pico.windows()))
        models = [
            pico.build(folder / "one", "llama"),
            pico.build(folder / "shards", "llama", shard_bytes=40_000),
            pico.build(folder / "tied", "qwen2", shard_bytes=60_000, tie_word_embeddings=True),
        ]
        sweeps: list[Sweep] = []
        for index, model in enumerate(models):
            sweeps.append(prune_sweep(warm, model, folder / f"prune{index}"))
            sweeps.append(score_sweep(warm, model, folder / f"score{index}", windows))
        while killed + commands < count:
            sweep = generator.choice(sweeps)
            before = sweep.kills
            if generator.randrange(VERBS) == 0:
                sweep.empty()
                longest = 0.3 if sweep.argv[0] == "prune" else 5.0
                commands += kill_command(sweep.argv, generator.uniform(0.02, longest)) == -9
                sweep.check_and_run_again()
            elif generator.random() < 0.7:
                sweep.kill(kill_at=generator.randint(1, sweep.writes), piece=generator.choice([4096, 8192, 65536]))
            else:
                sweep.kill(delay=generator.uniform(0, 0.15 if sweep.argv[0] == "prune" else 0.6))
            killed += sweep.kills - before
            finished += sweep.kills == before
    return {
        "kills_of_forked_children": killed, "kills_of_whole_commands": commands, "ran_to_the_end": finished,
        "kills_seconds": time.perf_counter() - started,
    }  # fmt: skip


def kills_on_all_cores(count: int, seed: int) -> dict[str, Any]:
    """The same in two processes, which also disturb each other's timing."""
    command = [sys.executable, "-W", "ignore", __file__, "--examples", "0", "--one-process"]
    halves = [
        subprocess.Popen([*command, "--kills", str(share), "--seed", str(number)], stdout=subprocess.PIPE, text=True)
        for number, share in ((seed, count // 2), (seed + 1, count - count // 2))
    ]
    found: dict[str, Any] = {"kills_ok": True}
    for half in halves:
        told, _ = half.communicate()
        found["kills_ok"] &= half.returncode == 0
        for key, value in (json.loads(told.splitlines()[-1]) if half.returncode == 0 else {}).items():
            found[key] = max(found.get(key, 0), value) if key == "kills_seconds" else found.get(key, 0) + value
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one-process", action="store_true")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    if given.kills:
        found |= (kills if given.one_process else kills_on_all_cores)(given.kills, given.seed)
    if given.examples:
        found |= examples(given.examples)
    print(json.dumps({key: round(value, 1) if isinstance(value, float) else value for key, value in found.items()}))
    sys.exit(0 if found.get("examples_ok", True) and found.get("kills_ok", True) else 1)


if __name__ == "__main__":
    main()
