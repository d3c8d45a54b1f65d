"""The whole way on the small model in the package: info, score, plan, prune, retrain, evaluate, and what it cost."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint.writer import write_file
from shortstack.embedded import MODEL_DIRECTORY, python_name
from shortstack.errors import ShortstackError
from shortstack.progress import Progress
from shortstack.tables import count, seconds, size, table

if TYPE_CHECKING:
    from shortstack.evaluation.results import Results

CRITERIA = "ppl,taylor,magnitude"
PROMPT = "The with statement is used to"
# A few seconds of distillation. The weights have seen this text often: its own next tokens have nothing to teach any
# more, the dense model's distributions do.
_HEALING = {"seq_len": 256, "batch": 8, "micro_batch": 8, "lr": 3e-4, "loss_weight": 0.0}
_HEALING_STEPS = 40
_TOLERANCE = 0.10  # of the model card's perplexity: the text differs a little between Python versions


@dataclass(frozen=True)
class QuickstartResult:
    """What the quickstart found and where it left everything."""

    out: Path
    removed: list[int]
    rows: dict[str, dict[str, Any]]
    samples: dict[str, str]
    card_ppl: float
    seconds: float

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
                f"{row['ppl']:.2f} ±{row['stderr']:.2f}",
                f"{row['change']['value']:+.1%} ±{100 * row['change']['stderr']:.1f}" if row["change"] else "",
            ]
            for name, row in self.rows.items()
        ]
        lines = [
            f"Perplexity on held-out text ({dense['tokens']} tokens of {python_name()}'s documentation, windows of 128;",
            "a change has the error of the windows' own changes):",
            "",
            table(["", "blocks", "parameters", "change", "bytes", "ppl", "change"], rows),
            "",
            *(f"[{name}] {_one_line(text)}" for name, text in self.samples.items()),
            "",
            f"Everything is in {self.out} ({seconds(self.seconds)}). Now on a checkpoint of your own:",
            "",
            "  shortstack info MODEL",
            "  shortstack score MODEL --data TEXT --criterion ppl,taylor,magnitude --out scores.json",
            "  shortstack prune MODEL --scores scores.json --criterion ppl --remove 6 --verify --out PRUNED",
            "  shortstack retrain lora PRUNED --data INSTRUCTIONS --out RETRAINED",
            "  shortstack eval ppl MODEL PRUNED RETRAINED --data OTHER_TEXT",
        ]
        return "\n".join(lines)


def quickstart(
    *, out: Path = Path("shortstack-quickstart"), force: bool = False, quiet: bool = False
) -> QuickstartResult:
    """Take the small model in the package through info, score, plan, prune, retrain and evaluate. About a minute.

    Retraining is left out where its packages are not installed (`pip install 'shortstack[retrain]'`).

    Args:
        out: the folder that everything is left in.
        force: replace what an earlier quickstart left there.
        quiet: no progress on stderr.

    Returns:
        Dense, pruned and retrained perplexity, sizes and continuations.

    Raises:
        ShortstackError: the dense perplexity is more than 10 % off the model card's, so something here is wrong.
    """
    from shortstack.comparing import compared
    from shortstack.information import info
    from shortstack.planning import plan
    from shortstack.pruning import prune
    from shortstack.scoring import score

    started = time.perf_counter()
    progress = Progress(quiet=quiet)
    out = Path(out)
    pruned = out / "pruned"
    progress.say("1/6 info: what the embedded model is\n")
    facts = info("embedded")
    progress.say(facts.to_text() + "\n")
    progress.say("2/6 score: what each block is worth, by three criteria\n")
    scores = score("embedded", criterion=CRITERIA, out=out / "scores.json", csv=out / "csv", quiet=quiet)
    progress.say(scores.to_text() + "\n")
    progress.say("3/6 plan: the quarter of the blocks that matters least by ppl\n")
    made = plan(
        "embedded", scores=out / "scores.json", criterion="ppl", remove=facts.blocks // 4, out=out / "plan.json"
    )
    progress.say(made.to_text() + "\n")
    progress.say("4/6 prune: a checkpoint without them, verified\n")
    progress.say(prune("embedded", plan=made, out=pruned, verify=True, force=force, quiet=quiet).to_text() + "\n")
    models = {"dense": "embedded", "pruned": str(pruned)}
    retrained = retrained_copy(pruned, out / "retrained", force=force, progress=progress)
    if retrained is not None:
        models["retrained"] = str(retrained)
    progress.say("6/6 evaluate: what that cost, on text that neither training nor scoring saw\n")
    results, samples = _evaluated(list(models.values()), out, quiet)
    rows: dict[str, dict[str, Any]] = {}
    (compared_figure,) = (one for one in compared(results.results, None, []).figures if one.name == "ppl_128")
    for name, result, change in zip(models, results.results, compared_figure.differences, strict=True):
        figure = result.figures["ppl_128"]
        rows[name] = {
            "blocks": facts.blocks if name == "dense" else len(made.kept),
            "parameters": result.parameters,
            "bytes": result.nbytes,
            "ppl": figure.value,
            "stderr": figure.stderr,
            "change": None if change is None else change.to_json(),
            "tokens": figure.n,
        }
    found = QuickstartResult(
        out=out,
        removed=list(made.removed),
        rows=rows,
        samples={name: result.per_item["texts"][0] for name, result in zip(models, samples.results, strict=True)},
        card_ppl=card_perplexity(),
        seconds=time.perf_counter() - started,
    )
    write_file(out / "quickstart.json", (json.dumps(found.to_json(), indent=1) + "\n").encode())
    check_dense(rows["dense"]["ppl"], found.card_ppl)
    return found


def _evaluated(models: list[str], out: Path, quiet: bool) -> tuple[Results, Results]:
    """Perplexities and continuations, computed here and now."""
    from shortstack.evaluation.options import EvaluationOptions
    from shortstack.evaluation.perplexity import evaluate_ppl
    from shortstack.evaluation.samples import evaluate_samples

    options = EvaluationOptions(fresh=True, quiet=quiet)
    results = evaluate_ppl(*models, seq_len="128", out=out / "results.json", options=options)
    return results, evaluate_samples(*models, prompt=PROMPT, count=1, new_tokens=40, options=options)


def retrained_copy(pruned: Path, out: Path, *, force: bool, progress: Progress) -> Path | None:
    """The pruned model after a few seconds of distillation from the dense one; None without the packages for it."""
    from shortstack.retraining.distill import retrain_distill
    from shortstack.retraining.options import TrainingOptions

    if importlib.util.find_spec("accelerate") is None:
        progress.say("5/6 retrain: left out, it needs pip install 'shortstack[retrain]'\n")
        return None
    progress.say("5/6 retrain: the dense model teaches the pruned one for a few seconds (distillation)\n")
    options = TrainingOptions(
        max_steps=_HEALING_STEPS, save_every=10**6, eval_every=10**6, log_every=10, validation=0, force=force,
        restart=True, quiet=progress.quiet,
    )  # fmt: skip
    retrain_distill(str(pruned), teacher="embedded", data="embedded", out=out, options=options, **_HEALING)  # type: ignore[arg-type]
    progress.say("")
    return out


def card_perplexity() -> float:
    """The held-out perplexity that the embedded model's card states."""
    card = (MODEL_DIRECTORY / "README.md").read_text(encoding="utf-8")
    match = re.search(r"held-out perplexity: \*\*([0-9.]+)\*\*", card)
    if match is None:
        raise ShortstackError(f"{MODEL_DIRECTORY / 'README.md'}: states no held-out perplexity; the package is damaged")
    return float(match.group(1))


def check_dense(measured: float | None, card: float) -> None:
    """Refuse a dense perplexity that is not the model card's: nothing else in the table could be believed.

    Raises:
        ShortstackError: they differ by more than 10 %.
    """
    if measured is None or not abs(measured / card - 1) <= _TOLERANCE:
        raise ShortstackError(
            f"the dense model's perplexity is {measured}, its card says {card:.2f}: this installation computes wrongly",
            hint="check the versions of torch and transformers; constraints.txt has a set that works",
        )


def _one_line(text: str) -> str:
    return " ".join(text.split())
