"""The whole way on the small model in the package: info, score, plan, prune, retrain, evaluate, report."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint.hub import EMBEDDED_MODEL
from shortstack.common.clock import command_seconds
from shortstack.common.formatting import count, seconds, size, table
from shortstack.common.options import stage
from shortstack.common.shown import Shown
from shortstack.data.embedded import python_name
from shortstack.errors import ShortstackError
from shortstack.runtime.atomic_output import write_json

if TYPE_CHECKING:
    from shortstack.recipes.run import RunResult

RECIPE = "quickstart"
_TOLERANCE = 0.10  # of the model card's perplexity: the text differs a little between Python versions


@dataclass(frozen=True, repr=False)
class QuickstartResult(Shown):
    """What the quickstart found and where it left everything."""

    out: Path
    removed: list[int]
    rows: dict[str, dict[str, Any]]
    samples: dict[str, str]
    card_ppl: float
    seconds: float
    report: Path

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "schema": 1,
            "out": str(self.out),
            "removed": self.removed,
            "models": self.rows,
            "samples": self.samples,
            "card_ppl": self.card_ppl,
            "seconds": self.seconds,
            "python": python_name(),
            "report": str(self.report),
        }

    def to_text(self) -> str:
        """The table, two continuations, and what to type next."""
        dense = self.rows["dense"]
        rows = [
            [
                name,
                str(row["blocks"]),
                count(row["parameters"]),
                f"{row['parameters'] / dense['parameters'] - 1:+.1%}" if row is not dense else "",
                size(row["bytes"]),
                _with_error(row["ppl"], row["stderr"], ".2f"),
                _with_error(row["change"]["value"], row["change"]["stderr"], "+.1%") if row["change"] else "",
            ]
            for name, row in self.rows.items()
        ]
        lines = [
            f"Perplexity on held-out text ({dense['tokens']} tokens of {python_name()}'s documentation, windows of 128;",
            "± is the standard error, paired over windows):",
            "",
            table(["", "blocks", "parameters", "change", "bytes", "ppl", "change"], rows),
            "",
            *(f"[{name}] {_one_line(text)}" for name, text in self.samples.items()),
            "",
            f"Everything is in {self.out} ({seconds(self.seconds)}). The report is {self.report}: open it in a browser.",
            "Now on a checkpoint of your own:",
            "",
            "  shortstack info MODEL",
            "  shortstack score MODEL --data TEXT --criterion ppl,taylor,magnitude --out scores.json",
            "  shortstack prune MODEL --scores scores.json --criterion ppl --remove 6 --verify --out PRUNED",
            "  shortstack retrain lora PRUNED --data INSTRUCTIONS --out RETRAINED",
            "  shortstack eval ppl MODEL PRUNED RETRAINED --data OTHER_TEXT --out ppl.json",
            "  shortstack report scores.json ppl.json PRUNED RETRAINED --out report.html",
            "  shortstack recipes                     # the published pipelines, by name",
        ]
        return "\n".join(lines)


@stage
def quickstart(
    *, out: Path = Path("shortstack-quickstart"), force: bool = False, quiet: bool = False
) -> QuickstartResult:
    """Run every stage on the small model in the package: info, score, plan, prune, retrain, evaluate, report.

    It takes about a minute.

    It runs the recipe `quickstart` (`shortstack recipes quickstart` shows it). Retraining is skipped if its packages
    are not installed (`pip install 'shortstack[retrain]'`).

    Args:
        out: Write everything into this folder. Steps that an earlier quickstart did there are skipped.
        force: Run every step again, also those that an earlier quickstart did.
        quiet: Show no progress on stderr.

    Returns:
        Dense, pruned and retrained perplexity, sizes and continuations.

    Raises:
        ShortstackError: the dense perplexity is more than 10 % off the model card's, so something here is wrong.
    """
    from shortstack.recipes.resolve import resolve
    from shortstack.recipes.run import RunResult, run

    first = resolve(RECIPE).steps[0].name
    done = run(RECIPE, out=out, from_=first if force else None, force=force, quiet=quiet)
    assert isinstance(done, RunResult)
    found = _found(done, command_seconds())
    write_json(Path(out) / "quickstart.json", found.to_json())
    check_dense(found.rows["dense"]["ppl"], found.card_ppl)
    return found


def _found(done: RunResult, seconds_taken: float) -> QuickstartResult:
    """What the steps have left in the run's folder, in one table."""
    from shortstack.artifacts.plan import load_plan
    from shortstack.artifacts.results import load_results
    from shortstack.evaluation.compare import compared

    left = {step.name: step.output for step in done.steps}
    plan, results = load_plan(left["plan"]), load_results(left["ppl"]).results
    samples = load_results(left["samples"]).results
    names = ["dense", *(name for name in ("pruned", "retrained") if name in left)]
    rows: dict[str, dict[str, Any]] = {}
    (figures,) = (one for one in compared(results, None, []).figures if one.name == "ppl_128")
    for name, result, change in zip(names, results, figures.differences, strict=True):
        figure = result.figures["ppl_128"]
        rows[name] = {
            "blocks": len(plan.blocks if name == "dense" else plan.kept),
            "parameters": result.parameters,
            "bytes": result.nbytes,
            "ppl": figure.value,
            "stderr": figure.stderr,
            "change": None if change is None else change.to_json(),
            "tokens": figure.n,
        }
    return QuickstartResult(
        out=done.out,
        removed=list(plan.removed),
        rows=rows,
        samples={name: result.per_item["texts"][0] for name, result in zip(names, samples, strict=True)},
        card_ppl=card_perplexity(),
        seconds=seconds_taken,
        report=left["report"],
    )


def card_perplexity() -> float:
    """The held-out perplexity that the embedded model's card states."""
    card = (EMBEDDED_MODEL / "README.md").read_text(encoding="utf-8")
    match = re.search(r"held-out perplexity: \*\*([0-9.]+)\*\*", card)
    if match is None:
        raise ShortstackError(f"{EMBEDDED_MODEL / 'README.md'}: states no held-out perplexity; the package is damaged")
    return float(match.group(1))


def check_dense(measured: float | None, card: float) -> None:
    """Refuse a dense perplexity that is not the model card's: nothing else in the table could be believed.

    Raises:
        ShortstackError: they differ by more than 10 %.
    """
    if measured is None or not abs(measured / card - 1) <= _TOLERANCE:
        raise ShortstackError(
            f"the dense model's perplexity is {measured}, its card says {card:.2f}: this installation gives wrong results",
            hint="check the versions of torch and transformers; constraints.txt has a set that works",
        )


def _with_error(value: float | None, stderr: float | None, form: str) -> str:
    """A figure with its error, as far as there are any: a broken model's perplexity is infinite."""
    if value is None:
        return "-"
    error = "" if stderr is None else f" ±{100 * stderr:.1f}" if form.endswith("%") else f" ±{stderr:{form}}"
    return f"{value:{form}}{error}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
