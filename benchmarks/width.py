"""Width against depth at equal parameters: perplexity, and, with `--bench`, latency and memory.

    python benchmarks/width.py MODEL --data calibration.txt --text evaluation.txt --work DIR --out width.json
    ... --bench --plot PNG          # the same command with these, when nothing else runs

Blocks are removed by `ppl` and by `taylor` (the first four and the last two stay); then heads and channels until the
parameters are nearest to what is left: key-value groups, query heads, or channels alone. All see the same calibration
windows; nothing is retrained. With `--bench` the models of one size take turns (`shortstack bench`). What is in DIR already
is taken from there. One JSON line per figure; a picture where `--plot` says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import figures_parser, known_figures, say
from shortstack.benchmark.bench import bench
from shortstack.evaluation.ppl import evaluate_ppl
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.prune import prune
from shortstack.pruning.width.prune_width import prune_width
from shortstack.scoring.score import score

DEPTH = {"blocks by ppl": "ppl", "blocks by taylor": "taylor"}
WIDTH: dict[str, dict[str, Any]] = {
    "key-value groups and channels": {},
    "query heads and channels": {"head_unit": "query-heads"},
    "channels": {"only": "mlp"},
}
TIMED = ("blocks by ppl", "key-value groups and channels", "query heads and channels", "channels")


def models(model: str, data: str, work: Path, blocks: list[int]) -> dict[tuple[str, int], Path]:
    """(kind, blocks' worth of parameters) -> checkpoint."""
    scores = work / "scores.json"
    if not scores.exists():
        score(model, out=scores, criterion="ppl,taylor", data=data)
    made: dict[tuple[str, int], Path] = {}
    for removed in blocks:
        for kind, criterion in DEPTH.items():
            out = made[kind, removed] = work / f"{kind.replace(' ', '-')}-{removed}"
            if not out.exists():
                prune(model, out=out, scores=scores, criterion=criterion, remove=removed)
        parameters = open_checkpoint(made["blocks by ppl", removed]).parameters()
        for kind, options in WIDTH.items():
            out = made[kind, removed] = work / f"{kind.replace(',', '').replace(' ', '-')}-{removed}"
            if not out.exists():
                print(prune_width(model, out=out, data=data, params=str(parameters), **options).to_text())
    return made


def perplexities(model: str, made: dict[tuple[str, int], Path], text: str) -> list[dict[str, Any]]:
    """A row per model: kind, parameters, perplexity with its error."""
    paths = {("dense", 0): Path(model), **made}
    results = evaluate_ppl(*map(str, paths.values()), data=text)
    rows = []
    for (kind, removed), path, result in zip(paths, paths.values(), results.results, strict=True):
        figure = result.figures["ppl_128"]
        parameters = open_checkpoint(path).parameters()
        row = {"kind": kind, "blocks": removed, "parameters": parameters, "ppl": figure.value, "stderr": figure.stderr}
        say("ppl", **row)
        rows.append(row)
    return rows


def timings(model: str, made: dict[tuple[str, int], Path], blocks: list[int], work: Path) -> list[dict[str, Any]]:
    """A row per model, batch and number of new tokens, from `shortstack bench`; models of one size take turns."""
    rows = []
    for removed in blocks:
        own = {"dense": Path(model), **{kind: made[kind, removed] for kind in TIMED}}
        out = work / f"bench-{removed}.json"
        results = bench(
            *map(str, own.values()), batch="1,8", new_tokens="64", runs=5, warmup=1, compare=True, out=out
        ).results
        kinds = {str(path): kind for kind, path in own.items()}
        for result in results:
            named = {name: figure.value for name, figure in result.figures.items() if figure.value is not None}
            row = {
                "kind": kinds.get(result.model, result.model),
                "blocks": removed,
                "batch": result.settings["batch"],
                "peak_rss_bytes": result.peak_rss_bytes,
                **named,
            }
            say("bench", **row)
            rows.append(row)
    return rows


def plot(found: dict[str, Any], path: Path) -> None:
    """Perplexity, memory and speed (beside the dense model of the same run) against the share of parameters removed."""
    from matplotlib.figure import Figure

    dense = next(row for row in found["ppl"] if row["kind"] == "dense")
    share = {row["blocks"]: 1 - row["parameters"] / dense["parameters"] for row in found["ppl"] if row["kind"] in DEPTH}
    panels = [("perplexity", "ppl", None)]
    panels += [(f"times as fast, batch {batch}", "latency_speedup", batch) for batch in (1, 8) if found["bench"]]
    panels += [("peak memory (MB), batch 8", "peak_rss_bytes", 8)] if found["bench"] else []
    figure = Figure(figsize=(5 * len(panels), 4.2), layout="constrained")
    for axes, (label, key, batch) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        rows = found["ppl" if batch is None else "bench"]
        own = [row for row in rows if batch is None or row["batch"] == batch]
        first = [row.get(key, 1.0) for row in own if row["kind"] == "dense"]
        scale = 1e-6 if key == "peak_rss_bytes" else 1
        for number, kind in enumerate([*DEPTH, *WIDTH]):
            points = sorted((share[row["blocks"]], row[key] * scale) for row in own if row["kind"] == kind)
            if points:
                xs, ys = zip((0.0, sum(first) / len(first) * scale), *points, strict=True)
                style = "o-" if kind in DEPTH else "s--"
                axes.plot([100 * x for x in xs], ys, style, color=f"C{number}", markersize=4, label=kind)
        axes.set_xlabel("parameters removed (%)")
        axes.set_ylabel(label)
        axes.set_yscale("log" if key == "ppl" else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = figures_parser(__doc__)
    parser.add_argument("--blocks", default="3,6,9", help="numbers of blocks to remove")
    parser.add_argument("--bench", action="store_true", help="measure latency and memory, too")
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    known = {"ppl": [], "bench": [], **known_figures(given)}
    blocks = [int(part) for part in given.blocks.split(",")]
    made = models(given.model, given.data, given.work, blocks)
    if not known["ppl"]:
        known["ppl"] = perplexities(given.model, made, given.text)
        given.out.write_text(json.dumps(known, indent=1))
    if given.bench:
        known["bench"] = timings(given.model, made, blocks, given.work)
        given.out.write_text(json.dumps(known, indent=1))
    if given.plot is not None:
        plot(known, given.plot)


if __name__ == "__main__":
    main()
