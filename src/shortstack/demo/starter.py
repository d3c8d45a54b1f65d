"""What `shortstack demo` shows when it is given nothing: the small model of the package, cut in several ways."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shortstack.common.progress import Progress
from shortstack.runtime.workspace import cache_folder

DENSE = "embedded"
REMOVED = 3
_STEPS = 40  # of retraining: what the quickstart takes, half a minute


@dataclass(frozen=True)
class Starter:
    """Checkpoints by the name that the page gives them, with their scores and results."""

    models: dict[str, str]
    scores: Path
    results: Path


def starter_models(progress: Progress) -> Starter:
    """Make what is not there yet, in the user's cache; every file and folder appears whole or not at all."""
    from shortstack import __version__
    from shortstack.evaluation.ppl import evaluate_ppl
    from shortstack.families.open_model import open_model

    dense = open_model(DENSE)
    folder = cache_folder() / f"demo-{dense.fingerprint[:12]}-{__version__}"
    scores, results = folder / "scores.json", folder / "results.json"
    narrower, shorter, retrained = (folder / name for name in ("narrower", "shorter", "retrained"))
    models = {"dense": DENSE, "narrower": str(narrower), "shorter": str(shorter), "retrained": str(retrained)}
    if results.is_file():
        return Starter(models, scores, results)
    progress.say(f"making the models of the page in {folder}, once; this takes about a minute ...")
    folder.mkdir(parents=True, exist_ok=True)
    _make(scores, narrower, shorter, retrained)
    evaluate_ppl(*models.values(), data="embedded", seq_len="128", out=results, quiet=True)
    return Starter(models, scores, results)


def _make(scores: Path, narrower: Path, shorter: Path, retrained: Path) -> None:
    from shortstack.families.open_model import open_model
    from shortstack.pruning.prune import prune
    from shortstack.pruning.width.prune_width import prune_width
    from shortstack.retraining.distill import retrain_distill
    from shortstack.scoring.score import score

    if not scores.is_file():
        score(DENSE, data="embedded", criterion="ppl,taylor", out=scores, quiet=True)
    if not shorter.is_dir():
        prune(DENSE, out=shorter, scores=scores, criterion="ppl", remove=REMOVED, plus=True, quiet=True)
    if not narrower.is_dir():  # as many parameters as the shorter one has
        parameters = open_model(str(shorter)).parameters()
        prune_width(DENSE, out=narrower, data="embedded", params=str(parameters), quiet=True)
    if not retrained.is_dir():
        retrain_distill(
            str(shorter), teacher=DENSE, data="embedded", out=retrained, loss_weight=0.0, lr=3e-4, seq_len=256,
            batch=8, micro_batch=8, max_steps=_STEPS, validation=0, quiet=True,
        )  # fmt: skip
