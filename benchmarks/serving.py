"""The pruned model at work: speed-ups against the ideal, memory, sizes, and pruned drafts of the dense model.

    make real && python benchmarks/serving.py real/smollm2 [--folder DIR] [--engine transformers,compiled] [--runs 25]

Run it on a quiet machine, with as many threads as it has cores. Blocks are chosen by `ppl` with the + rule. It writes into
DIR (default: serving) the pruned checkpoints, bench-*.json, draft-*.json, serving.md (the tables) and pictures, and prints a
JSON line per figure. The goal: prefill and decoding at least 95 % of the ideal. What an earlier run has made or measured is
used again (delete its file to measure it again); a sweep that was interrupted resumes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import shortstack
from common import Goals, say
from shortstack.artifacts.results import Result, load_results, shown_figure
from shortstack.common.formatting import size

REMOVED = (4, 8, 15)
GOAL = 0.95


def cuts(dense: Path, folder: Path) -> dict[int, Path]:
    """The dense model and it without some blocks, by the number of blocks removed."""
    scores = folder / "scores.json"
    if not scores.is_file():
        shortstack.score(str(dense), criterion="ppl", samples=20, out=scores)
    found = {0: dense}
    for removed in REMOVED:
        found[removed] = folder / f"without-{removed}"
        if not (found[removed] / "config.json").is_file():
            shortstack.prune(
                str(dense), scores=str(scores), criterion="ppl", remove=removed, plus=True, out=found[removed]
            )
    return found


def sweep(models: dict[int, Path], folder: Path, engine: str, runs: int, quick: bool) -> list[Result]:
    """Every model in turns: batch 1 and 8, a prompt of 128 tokens, 64 new ones."""
    out = folder / f"bench-{engine.replace('.', '')}.json"
    shape = {"batch": "1", "new_tokens": "8", "runs": 5, "warmup": 2} if quick else {
        # Larger batches of llama.cpp need a program that its Python package does not have.
        "batch": "1" if engine == "llama.cpp" else "1,8", "new_tokens": "64", "runs": runs, "warmup": max(1, runs // 5)
    }  # fmt: skip
    if not out.is_file():
        for path in models.values() if engine == "llama.cpp" else ():  # it runs NAME.gguf beside the checkpoint NAME
            if not (file := path.with_name(f"{path.name}.gguf")).is_file():
                shortstack.export_gguf(str(path), out=file)
        measured = shortstack.bench(
            *map(str, models.values()), engine=engine, prompt_tokens=128, compare=True, out=out, plot=folder, **shape
        )
        print(measured.to_text(), file=sys.stderr)
    return list(load_results(out).results)


def reported(results: list[Result], models: dict[int, Path], goals: Goals) -> list[str]:
    """Figures with their goals; rows of the table."""
    rows = []
    removed_of = {str(path): removed for removed, path in models.items()}
    for result in results:
        figures, settings, removed = result.figures, result.settings, removed_of[result.model]
        name = f"{settings['engine']}, batch {settings['batch']}, {removed} removed"
        for part in ("prefill", "decode"):
            share = figures.get(f"{part}_of_ideal")
            if share is not None and share.value is not None:
                goals.figure(
                    f"{part}: {name}", share.value, at_least=GOAL, stderr=share.stderr,
                    speedup=figures[f"{part}_speedup"].value, ideal=figures[f"{part}_ideal"].value,
                )  # fmt: skip
        cells = [settings["engine"], settings["batch"], removed, *(
            shown_figure(figures.get(figure)) for figure in (
                "prefill", "prefill_speedup", "prefill_ideal", "prefill_of_ideal", "tpot", "decode_speedup", "decode_ideal",
                "decode_of_ideal", "throughput", "latency_variation",
            )
        ), size(result.peak_device_bytes or result.peak_rss_bytes), size(result.nbytes)]  # fmt: skip
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return rows


def drafts(models: dict[int, Path], folder: Path, quick: bool) -> list[str]:
    """Each pruned model as the draft of the dense one, with few and with more tokens at a time."""
    rows = []
    for removed in REMOVED:
        for tokens in (3,) if quick else (2, 4):
            out = folder / f"draft-{removed}-{tokens}.json"
            if not out.is_file():
                shortstack.bench(
                    str(models[0]), draft=str(models[removed]), draft_tokens=tokens, out=out,
                    **({"new_tokens": "16", "runs": 4, "warmup": 1} if quick
                       else {"new_tokens": "64", "runs": 22, "warmup": 2}),
                )  # fmt: skip
            figures = load_results(out).results[0].figures
            say(f"draft without {removed}, {tokens} at a time", **{name: one.value for name, one in figures.items()})
            names = (
                "acceptance", "accepted_length", "break_even_length", "dense_rate", "assisted_rate", "speedup", "identical",
            )  # fmt: skip
            rows.append(f"| {removed} | {tokens} | " + " | ".join(shown_figure(figures[name]) for name in names) + " |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("serving"))
    parser.add_argument("--engine", default="transformers,compiled")
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--drafts", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quick", action="store_true", help="try the script out: the figures mean nothing")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    goals, models = Goals(), cuts(given.model, given.folder)
    lines = [
        "| engine | batch | blocks removed | first token (s) | speed-up | ideal | of it | per token (s) | speed-up | ideal "
        "| of it | tokens/s | spread | peak memory | bytes |",
        "|---" * 15 + "|",
    ]
    for engine in given.engine.split(","):
        lines += reported(sweep(models, given.folder, engine, given.runs, given.quick), models, goals)
    if given.drafts:
        lines += [
            "",
            "| blocks removed | tokens at a time | accepted | tokens a pass | break-even | dense tokens/s | with the draft "
            "| times as fast | same text |",
            "|---" * 9 + "|",
            *drafts(models, given.folder, given.quick),
        ]
    (given.folder / "serving.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines), file=sys.stderr)
    if not given.quick:
        goals.end()


if __name__ == "__main__":
    main()
