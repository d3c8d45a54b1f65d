"""What repairs without training give back: repairs x criteria x shares of the blocks, scattered and adjacent.

    python benchmarks/repair.py real/smollm2 --data fit.txt --text test.txt,other.txt --work WORK --out repair.json

Of every set of blocks the dense, the pruned and each repaired checkpoint is measured on text that neither chose blocks nor
fitted a repair. A figure is the share of the lost log-perplexity that is back. One JSON line per figure; what is in `--out`
already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

from common import figures_parser, known_figures, say
from shortstack.evaluation.ppl import evaluate_ppl
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
        return name
    scores = work / "scores.json"
    if not scores.exists():
        score(model, data=data, criterion="ppl,bi", samples=10, out=scores, quiet=True)
    out = work / "chosen"
    criterion = "ppl" if name == "contiguous" else name
    strategy = "contiguous" if name == "contiguous" else "one-shot"
    count = round(share * open_checkpoint(model).depth)
    result = prune(
        model, scores=scores, criterion=criterion, strategy=strategy, remove=count, out=out, force=True, quiet=True
    )  # fmt: skip
    return ",".join(map(str, result.plan.removed))


def perplexities(models: list[str], texts: str, limit: int) -> dict[str, dict[str, float]]:
    """Model -> text -> perplexity."""
    found: dict[str, dict[str, float]] = {}
    for result in evaluate_ppl(*models, data=texts, seq_len=str(SEQ_LEN), limit=limit, quiet=True).results:
        value = result.figures[f"ppl_{SEQ_LEN}"].value
        assert value is not None
        found.setdefault(result.model, {})[Path(result.data["source"]).name] = value
    return found


def measured(given: argparse.Namespace, blocks: str, known: dict[str, Any]) -> None:
    """All repairs of one set of blocks that are not in the file yet."""
    pruned = given.work / f"without-{blocks.replace(',', '-')}"
    own = known.setdefault(blocks, {})
    for method in given.methods.split(","):
        if method in own:
            continue
        prune(given.model, blocks=blocks, out=pruned, force=True, quiet=True)
        out = given.work / "repaired"
        name, _, behind = method.partition("+")
        more = {"behind": int(behind)} if behind else {}
        result = repair(
            str(pruned), of=given.model, data=given.data, out=out, method=name, samples=given.samples, seq_len=SEQ_LEN,
            memory="resident", force=True, quiet=True, **more,
        )  # fmt: skip
        ppl = perplexities([given.model, str(pruned), str(out)], given.text, given.limit)
        logs = {
            text: [math.log(ppl[one][text]) for one in (given.model, str(pruned), str(out))] for text in ppl[str(out)]
        }
        own[method] = {
            "ppl": {text: [ppl[one][text] for one in (given.model, str(pruned), str(out))] for text in logs},
            "back": {text: (b - c) / (b - a) for text, (a, b, c) in logs.items()},
            "back_on_validation": result.share_back,
            "places": result.places,
            "seconds": result.seconds,
        }
        say(
            "repair",
            blocks=blocks,
            method=method,
            seconds=result.seconds,
            **own[method]["back"],
            ppl=own[method]["ppl"],
        )
        given.out.write_text(json.dumps(known, indent=1))
        shutil.rmtree(out)


def main() -> None:
    parser = figures_parser(__doc__)
    parser.add_argument("--sets", default=SETS, help=f"{SETS}, or blocks such as 14-17")
    parser.add_argument("--shares", default="0.1,0.2,0.3", help="shares of the blocks")
    parser.add_argument("--methods", default=METHODS, help="linear+3 repairs three blocks behind each cut, too")
    parser.add_argument("--samples", type=int, default=128, help=f"windows of {SEQ_LEN} tokens to fit on")
    parser.add_argument("--limit", type=int, default=64, help="windows of each evaluation text")
    given = parser.parse_args()
    known = known_figures(given)
    for name in given.sets.split(","):
        shares = [0.0] if name[0].isdigit() else [float(share) for share in given.shares.split(",")]
        for share in shares:
            measured(given, removed_of(given.model, name, share, given.data, given.work), known)


if __name__ == "__main__":
    main()
