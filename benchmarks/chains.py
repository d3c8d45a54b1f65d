"""Chains of repairs and trainings after one cut, each on the same text: what is back of the log-perplexity that was lost.

    python benchmarks/chains.py real/smollm2 --data fit.txt --text test.txt,other.txt --work WORK --out chains.json \\
        --chains "repair; local; repair + local; local radius=all; repair + local + lora"

A chain is steps with options of `shortstack repair`, `retrain local`, `retrain lora` or `retrain cpt`, each on what the
one before it wrote. What several chains begin with is made once, and what is in WORK or `--out` already is taken from
there. The removed blocks are those that cost least by `ppl`; none is protected. One JSON line per chain; shares have
standard errors over windows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import statistics
import time
from pathlib import Path
from typing import Any

from common import figures_parser, known_figures, losses, say, share_back
from shortstack.pruning.prune import prune
from shortstack.pruning.repair.repair import repair
from shortstack.retraining.cpt import retrain_cpt
from shortstack.retraining.local import retrain_local
from shortstack.retraining.lora import retrain_lora
from shortstack.scoring.score import score

CHAINS = "repair; local; local radius=all; repair + local; repair + local + lora; lora"
SEQ_LEN = 256


def pruned(given: argparse.Namespace) -> Path:
    """The model without the blocks whose removal costs least."""
    scores, out = given.work / "scores.json", given.work / f"without-{given.remove}"
    if not scores.exists():
        score(given.model, data=given.data, criterion="ppl", samples=10, out=scores, quiet=True)
    if not out.exists():
        prune(given.model, scores=scores, criterion="ppl", remove=given.remove, plus=False, out=out, quiet=True)
    return out


def ran(step: str, start: Path, out: Path, given: argparse.Namespace) -> None:
    """One step of a chain, from one checkpoint to another."""
    way, *words = step.split()
    own = dict(word.split("=") for word in words)
    for name, value in own.items():
        with contextlib.suppress(ValueError):  # a number, or text
            own[name] = json.loads(value)
    shared: dict[str, Any] = {"data": given.data, "out": out, "quiet": True, "dtype": given.dtype}
    if way == "repair":
        repair(str(start), of=given.model, **{**shared, "samples": given.samples, "seq_len": SEQ_LEN, **own})
        return
    steps: dict[str, Any] = {"tokens": given.tokens, "lr": 1e-3, "micro_batch": 4, "validation": 8, **shared}
    if way == "local":
        retrain_local(str(start), of=given.model, **{**steps, "seq_len": SEQ_LEN, "batch": 4, **own})
    elif way == "lora":
        retrain_lora(str(start), **{**steps, "cutoff": SEQ_LEN, "batch": 16, "dense": given.model, **own})
    elif way == "cpt":
        retrain_cpt(str(start), **{**steps, "seq_len": SEQ_LEN, "batch": 16, "dense": given.model, **own})
    else:
        raise SystemExit(f"{step}: expected repair, local, lora or cpt, and options such as radius=all")


def made(chain: str, given: argparse.Namespace) -> tuple[Path, float]:
    """(what a chain ends with, processor seconds of the steps that were not there yet)."""
    current, so_far, started = pruned(given), "", time.process_time()
    for step in chain.split("+"):
        so_far = f"{so_far} {step}".strip()
        out = given.work / re.sub(r"[^A-Za-z0-9.=]+", "-", so_far)
        if not out.exists():
            ran(step, current, out, given)
        current = out
    return current, time.process_time() - started


def main() -> None:
    parser = figures_parser(__doc__)
    parser.add_argument("--chains", default=CHAINS, help=f"separated by semicolons; by default {CHAINS}")
    parser.add_argument("--remove", type=int, default=8, help="blocks")
    parser.add_argument(
        "--tokens", default="24K", help="of text, that each step trains on unless it says another number"
    )
    parser.add_argument(
        "--samples", type=int, default=128, help=f"windows of {SEQ_LEN} tokens that repairs are fitted on"
    )
    parser.add_argument("--limit", type=int, default=64, help="windows of each evaluation text")
    parser.add_argument("--dtype", default="auto", help="the data type to train and to repair in")
    parser.add_argument("--evaluated-in", default="auto", metavar="DTYPE", help="the data type to evaluate in")
    given = parser.parse_args()
    known = known_figures(given)
    how: dict[str, Any] = {"seq_len": 128, "limit": given.limit, "dtype": given.evaluated_in}
    for name, path in (("dense", given.model), ("pruned", None)):
        if name not in known:
            known[name] = losses(path or pruned(given), given.text, **how)
    for chain in map(str.strip, given.chains.split(";")):
        if chain in known:
            continue
        out, seconds = made(chain, given)
        known[chain] = losses(out, given.text, **how)
        given.out.write_text(json.dumps(known, indent=1))
        dense, cut, after = known["dense"], known["pruned"], known[chain]
        back = {text: share_back(dense[text], cut[text], after[text]) for text in after}
        ppl = {text: [math.exp(statistics.fmean(one[text])) for one in (dense, cut, after)] for text in after}
        say(
            "chains",
            chain=chain,
            remove=given.remove,
            tokens=given.tokens,
            processor_seconds=seconds,
            back=back,
            ppl=ppl,
        )


if __name__ == "__main__":
    main()
