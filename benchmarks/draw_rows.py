"""Ten windows drawn as published from very many short rows: counted and read by number, and all of them in memory.

python benchmarks/draw_rows.py [ROWS] [FOLDER]   (about 5 % of BookCorpus by default; sentences of 60 bytes, 1 of 5000 long)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BOOKCORPUS = 74_004_228


def write(folder: Path, rows: int) -> None:
    """Parquet files of 250,000 rows in row groups of 1000, as the hub converts sets."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file, start in enumerate(range(0, rows, 250_000)):
        numbers = range(start, min(start + 250_000, rows))
        texts = [f"{n} " + ("a sentence of a book. " * (40 if n % 5000 == 777 else 2)) for n in numbers]
        pq.write_table(pa.table({"text": texts}), folder / f"{file:04}.parquet", row_group_size=1000)


def draw(folder: str, beyond: int | None) -> None:
    """In a process of its own: what it took, as JSON."""
    from shortstack.data.calibration import draw_windows
    from shortstack.data.sources import read_corpus
    from shortstack.data.tokenizer import load_tokenizer
    from shortstack.families.open_model import open_checkpoint
    from shortstack.runtime.memory import peak_rss_bytes

    tokenizer = load_tokenizer(open_checkpoint("embedded"))
    before, started = peak_rss_bytes(), time.perf_counter()
    corpus = read_corpus(folder, role="calibration", counted_beyond=beyond)
    drawn = draw_windows(corpus, tokenizer, samples=10, seq_len=128, sampling="published")
    took = {"seconds": time.perf_counter() - started, "bytes": peak_rss_bytes() - before, "rows": corpus.rows}
    print(json.dumps({**took, "marks": drawn.record["marks"]["hashes"]}))


def main() -> None:
    """Write the rows, draw both ways, print a line each."""
    if sys.argv[1:2] == ["--draw"]:
        return draw(sys.argv[2], int(sys.argv[3]) if sys.argv[3:] else None)
    rows = int(sys.argv[1]) if sys.argv[1:] else BOOKCORPUS // 20
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if sys.argv[2:] else None) as folder:
        write(Path(folder), rows)
        found = []
        for name, beyond in (("counted", ["0"]), ("all in memory", [])):
            done = subprocess.run(
                [sys.executable, "-W", "ignore", __file__, "--draw", folder, *beyond],
                stdout=subprocess.PIPE,
                check=True,
            )
            found.append(json.loads(done.stdout))
            print(
                f"{name}: {found[-1]['rows']} rows, {found[-1]['seconds']:.1f} s, {found[-1]['bytes'] / 1e6:.0f} MB more"
            )
        assert found[0]["marks"] == found[1]["marks"]
        return print("the same windows")


if __name__ == "__main__":
    main()
