"""What rows of instructions take in memory once they are tokens: read, split and put into batches, in a process of its own.

python benchmarks/instruction_rows.py ROWS.json [MODEL] [--rows 50000]   (ROWS.json is repeated until there are so many)
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


def write(source: Path, path: Path, count: int) -> None:
    """Rows of a file over and over, each with a number of its own, a line each."""
    rows = json.loads(source.read_text())
    with path.open("w") as file:
        for number, row in zip(range(count), itertools.cycle(rows), strict=False):
            file.write(json.dumps({**row, "instruction": f"{row['instruction']} ({number})"}) + "\n")


def read(data: str, model: str) -> None:
    """In a process of its own: what it took, as JSON."""
    from shortstack.common.progress import Progress
    from shortstack.data.collators import Sharding
    from shortstack.data.loaders import open_dataset
    from shortstack.data.tokenizer import load_tokenizer
    from shortstack.families.open_model import open_checkpoint
    from shortstack.runtime.memory import peak_rss_bytes

    checkpoint = open_checkpoint(model)
    tokenizer = load_tokenizer(checkpoint)
    tokenizer("warm")
    gc.collect()
    process = psutil.Process()
    before, started = process.memory_info().rss, time.process_time()
    dataset = open_dataset(
        data, tokenizer, seq_len=256, progress=Progress(quiet=True), embedding_rows=checkpoint.embedding_rows
    )
    tokens = dataset.tokens_per_epoch
    first = next(iter(dataset.loader(Sharding(64, 4), 0, 1, {}, 0)))
    took = time.process_time() - started
    gc.collect()
    kept, peak = process.memory_info().rss - before, peak_rss_bytes() - before
    print(json.dumps({"tokens": tokens, "kept": kept, "peak": peak, "cpu": took, "sum": int(first["input_ids"].sum())}))


def main() -> None:
    """Write the rows, read them, print a line."""
    if sys.argv[1:2] == ["--read"]:
        return read(*sys.argv[2:4])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--rows", type=int, default=50_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write(given.source, data, given.rows)
        command = [sys.executable, "-W", "ignore", __file__, "--read", str(data), given.model]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    print(
        f"{given.rows} rows, {found['tokens']} tokens: {found['kept'] / 1e6:.0f} MB kept, {found['peak'] / 1e6:.0f} MB at "
        f"the peak, {found['cpu']:.1f} s of a processor (first batch {found['sum']})"
    )
    return None


if __name__ == "__main__":
    main()
