"""What `shortstack demo` shows when it is given nothing: the small model of the package, cut in several ways."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shortstack.common.progress import Progress
from shortstack.evaluation.cache import kept_folder

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
    import shortstack
    from shortstack.families.open_model import open_model

    dense = open_model(DENSE)
    folder = kept_folder() / f"demo-{dense.fingerprint[:12]}-{shortstack.__version__}"
    scores, results = folder / "scores.json", folder / "results.json"
    shorter, retrained, narrower = folder / "shorter", folder / "retrained", folder / "narrower"
    models = {"dense": DENSE, "narrower": str(narrower), "shorter": str(shorter), "retrained": str(retrained)}
    if results.is_file():
        return Starter(models, scores, results)
    progress.say(f"making the models of the page in {folder}, once; this takes about a minute ...")
    folder.mkdir(parents=True, exist_ok=True)
    _make(scores, shorter, narrower, retrained)
    shortstack.evaluate_ppl(*models.values(), data="embedded", seq_len="128", out=results, quiet=True)
    return Starter(models, scores, results)


def _make(scores: Path, shorter: Path, narrower: Path, retrained: Path) -> None:
    import shortstack

    if not scores.is_file():
        shortstack.score(DENSE, data="embedded", criterion="ppl,taylor", out=scores, quiet=True)
    if not shorter.is_dir():
        shortstack.prune(DENSE, out=shorter, scores=scores, criterion="ppl", remove=REMOVED, plus=True, quiet=True)
    if not retrained.is_dir():
        shortstack.retrain_distill(
            str(shorter), teacher=DENSE, data="embedded", out=retrained, loss_weight=0.0, lr=3e-4, seq_len=256,
            batch=8, micro_batch=8, max_steps=_STEPS, validation=0, quiet=True,
        )  # fmt: skip
