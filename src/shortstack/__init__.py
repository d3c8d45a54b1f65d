"""shortstack: make the stack of Transformer blocks of a language model shorter.

The stages are functions: `score`, `plan`, `prune`, `retrain_lora`, `retrain_cpt`, `retrain_distill`, `merge`, `teach`,
`evaluate_ppl` (also `evaluate`), `evaluate_zeroshot`, `evaluate_generation`, `samples`, `evaluate_all`, `compare`, `agree`,
`check`, `info`; `run` chains them by a recipe. Names are imported when first used, so that `import shortstack` takes no
time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shortstack.artifacts.plan import PrunePlan, load_plan
    from shortstack.artifacts.results import Figure, Result, Results, load_results
    from shortstack.artifacts.scores import CriterionScores, Scores, load_scores
    from shortstack.checkpoint.reader import Checkpoint
    from shortstack.errors import ShortstackError, UsageError
    from shortstack.evaluation.all import evaluate_all
    from shortstack.evaluation.compare import Comparison, compare
    from shortstack.evaluation.generation import evaluate_generation
    from shortstack.evaluation.options import EvaluationOptions
    from shortstack.evaluation.ppl import evaluate_ppl
    from shortstack.evaluation.ppl import evaluate_ppl as evaluate
    from shortstack.evaluation.samples import evaluate_samples as samples
    from shortstack.evaluation.zeroshot import evaluate_zeroshot
    from shortstack.families.open_model import open_checkpoint
    from shortstack.inspection.check import check
    from shortstack.inspection.info import Info, info
    from shortstack.pruning.plan import plan
    from shortstack.pruning.prune import PruneResult, prune
    from shortstack.recipes.dry_run import Rehearsal
    from shortstack.recipes.run import RunResult, run
    from shortstack.retraining.cpt import retrain_cpt
    from shortstack.retraining.distill import retrain_distill
    from shortstack.retraining.lora import retrain_lora
    from shortstack.retraining.merge import MergeResult, merge
    from shortstack.retraining.options import TrainingOptions
    from shortstack.retraining.results import RetrainEstimate, RetrainResult
    from shortstack.retraining.teach import TeachResult, teach
    from shortstack.scoring.agreement import Agreements, agree
    from shortstack.scoring.score import score

_WHERE = {
    "Agreements": "scoring.agreement:Agreements",
    "Checkpoint": "checkpoint.reader:Checkpoint",
    "Comparison": "evaluation.compare:Comparison",
    "CriterionScores": "artifacts.scores:CriterionScores",
    "EvaluationOptions": "evaluation.options:EvaluationOptions",
    "Figure": "artifacts.results:Figure",
    "Info": "inspection.info:Info",
    "MergeResult": "retraining.merge:MergeResult",
    "PrunePlan": "artifacts.plan:PrunePlan",
    "PruneResult": "pruning.prune:PruneResult",
    "Rehearsal": "recipes.dry_run:Rehearsal",
    "Result": "artifacts.results:Result",
    "Results": "artifacts.results:Results",
    "RetrainEstimate": "retraining.results:RetrainEstimate",
    "RetrainResult": "retraining.results:RetrainResult",
    "RunResult": "recipes.run:RunResult",
    "Scores": "artifacts.scores:Scores",
    "ShortstackError": "errors:ShortstackError",
    "TeachResult": "retraining.teach:TeachResult",
    "TrainingOptions": "retraining.options:TrainingOptions",
    "UsageError": "errors:UsageError",
    "agree": "scoring.agreement:agree",
    "check": "inspection.check:check",
    "compare": "evaluation.compare:compare",
    "evaluate": "evaluation.ppl:evaluate_ppl",
    "evaluate_all": "evaluation.all:evaluate_all",
    "evaluate_generation": "evaluation.generation:evaluate_generation",
    "evaluate_ppl": "evaluation.ppl:evaluate_ppl",
    "evaluate_zeroshot": "evaluation.zeroshot:evaluate_zeroshot",
    "info": "inspection.info:info",
    "load_plan": "artifacts.plan:load_plan",
    "load_results": "artifacts.results:load_results",
    "load_scores": "artifacts.scores:load_scores",
    "merge": "retraining.merge:merge",
    "open_checkpoint": "families.open_model:open_checkpoint",
    "plan": "pruning.plan:plan",
    "prune": "pruning.prune:prune",
    "retrain_cpt": "retraining.cpt:retrain_cpt",
    "retrain_distill": "retraining.distill:retrain_distill",
    "retrain_lora": "retraining.lora:retrain_lora",
    "run": "recipes.run:run",
    "samples": "evaluation.samples:evaluate_samples",
    "score": "scoring.score:score",
    "teach": "retraining.teach:teach",
}

__all__ = [
    "Agreements",
    "Checkpoint",
    "Comparison",
    "CriterionScores",
    "EvaluationOptions",
    "Figure",
    "Info",
    "MergeResult",
    "PrunePlan",
    "PruneResult",
    "Rehearsal",
    "Result",
    "Results",
    "RetrainEstimate",
    "RetrainResult",
    "RunResult",
    "Scores",
    "ShortstackError",
    "TeachResult",
    "TrainingOptions",
    "UsageError",
    "agree",
    "check",
    "compare",
    "evaluate",
    "evaluate_all",
    "evaluate_generation",
    "evaluate_ppl",
    "evaluate_zeroshot",
    "info",
    "load_plan",
    "load_results",
    "load_scores",
    "merge",
    "open_checkpoint",
    "plan",
    "prune",
    "retrain_cpt",
    "retrain_distill",
    "retrain_lora",
    "run",
    "samples",
    "score",
    "teach",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("shortstack")
    if name not in _WHERE:
        raise AttributeError(f"module 'shortstack' has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    return getattr(importlib.import_module(f"shortstack.{module}"), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
