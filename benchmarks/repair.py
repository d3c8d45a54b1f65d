"""What repairs without training give back: repairs x criteria x shares of the blocks, scattered and adjacent.

    python benchmarks/repair.py real/smollm2 --data fit.txt --text test.txt,other.txt --work WORK --out repair.json

Of every set of blocks the dense, the pruned and each repaired checkpoint is measured on text that neither chose blocks nor
fitted a repair. A figure is the share of the lost log-perplexity that is back, with its standard error over windows. One JSON
line per figure; what is in `--out` already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

from common import figures_parser, known_figures, losses, say, share_back
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.prune import prune
from shortstack.pruning.repair.repair import repair
from shortstack.scoring.score import score

SETS = "ppl,bi,contiguous"
METHODS = "scale,linear,full,auto"
SEQ_LEN = 256


def removed_of(model: str, name: str, share: float, data: str, work: Path) -> str:
    """The blocks that a criterion removes, as `--blocks` takes them; `contiguous`: adjacent ones with the lowest sum."""
    if name[0].isdigit():
        return name.replace("+", ",")
    scores = work / "scores.json"
    if not scores.exists():
        score(model, data=data, criterion="ppl,bi,taylor", samples=10, out=scores, quiet=True)
    out = work / "chosen"
    criterion = "ppl" if name == "contiguous" else name
    strategy = "contiguous" if name == "contiguous" else "one-shot"
    count = round(share * open_checkpoint(model).depth)
    result = prune(
        model, scores=scores, criterion=criterion, strategy=strategy, remove=count, out=out, force=True, quiet=True
    )  # fmt: skip
    return ",".join(map(str, result.plan.removed))


def measured(given: argparse.Namespace, blocks: str, known: dict[str, Any]) -> None:
    """All repairs of one set of blocks that are not in the file yet."""
    pruned, repaired = given.work / f"without-{blocks.replace(',', '-')}", given.work / "repaired"
    own = known.setdefault(blocks, {})
    how: dict[str, Any] = {"seq_len": SEQ_LEN, "limit": given.limit, "dtype": given.dtype}
    if not pruned.exists():
        prune(given.model, blocks=blocks, out=pruned, quiet=True)
    known["dense"] = known.get("dense") or losses(given.model, given.text, **how)
    own["pruned"] = own.get("pruned") or losses(pruned, given.text, **how)
    for method in given.methods.split(","):
        if method in own:
            continue
        name, _, behind = method.partition("+")
        more = {"behind": int(behind)} if behind else {}
        before = time.process_time()
        result = repair(
            str(pruned), of=given.model, data=given.data, out=repaired, method=name, samples=given.samples,
            seq_len=SEQ_LEN, memory="resident", force=True, quiet=True, **more,
        )  # fmt: skip
        seconds, after = time.process_time() - before, losses(repaired, given.text, **how)
        three = {text: (known["dense"][text], own["pruned"][text], after[text]) for text in after}
        own[method] = {
            "ppl": {text: [math.exp(sum(one) / len(one)) for one in each] for text, each in three.items()},
            "back": {text: share_back(*each) for text, each in three.items()},
            "back_on_validation": result.share_back,
            "places": result.places,
            "processor_seconds": seconds,
        }
        shown = {name: own[method][name] for name in ("back", "ppl", "back_on_validation", "processor_seconds")}
        say("repair", blocks=blocks, method=method, **shown)
        given.out.write_text(json.dumps(known, indent=1))
        shutil.rmtree(repaired)


def main() -> None:
    parser = figures_parser(__doc__)
    parser.add_argument("--sets", default=SETS, help=f"{SETS}, or blocks such as 14-17 or 4-5+17")
    parser.add_argument("--shares", default="0.1,0.2,0.3", help="shares of the blocks")
    parser.add_argument("--methods", default=METHODS, help="linear+3 repairs three blocks behind each cut, too")
    parser.add_argument("--samples", type=int, default=128, help=f"windows of {SEQ_LEN} tokens to fit on")
    parser.add_argument("--limit", type=int, default=64, help="windows of each evaluation text")
    parser.add_argument("--dtype", default="auto", help="the data type to evaluate in")
    parser.add_argument("--choose", help="text that chooses blocks, in place of --data")
    given = parser.parse_args()
    known = known_figures(given)
    for name in given.sets.split(","):
        shares = [0.0] if name[0].isdigit() else [float(share) for share in given.shares.split(",")]
        for share in shares:
            measured(given, removed_of(given.model, name, share, given.choose or given.data, given.work), known)


if __name__ == "__main__":
    main()
