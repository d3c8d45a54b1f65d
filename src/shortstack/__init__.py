"""shortstack: make the stack of Transformer blocks of a language model shorter.

The stages are functions: `score`, `plan`, `prune`, `retrain_lora`, `retrain_cpt`, `retrain_distill`, `merge`, `teach`,
`evaluate_ppl` (also `evaluate`), `evaluate_zeroshot`, `evaluate_generation`, `samples`, `evaluate_all`, `compare`, `agree`,
`check`, `info`; `run` chains them by a recipe. Names are imported when first used, so that `import shortstack` takes no
time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shortstack.agreement import Agreements, agree
    from shortstack.checking import check
    from shortstack.checkpoint.reader import Checkpoint, open_checkpoint
    from shortstack.comparing import Comparison, compare
    from shortstack.errors import ShortstackError, UsageError
    from shortstack.evaluation.everything import evaluate_all
    from shortstack.evaluation.generation import evaluate_generation
    from shortstack.evaluation.options import EvaluationOptions
    from shortstack.evaluation.perplexity import evaluate_ppl
    from shortstack.evaluation.perplexity import evaluate_ppl as evaluate
    from shortstack.evaluation.results import Figure, Result, Results, load_results
    from shortstack.evaluation.samples import evaluate_samples as samples
    from shortstack.evaluation.zeroshot import evaluate_zeroshot
    from shortstack.information import Info, info
    from shortstack.planning import plan
    from shortstack.plans import PrunePlan, load_plan
    from shortstack.pruning import PruneResult, prune
    from shortstack.recipes.rehearsing import Rehearsal
    from shortstack.recipes.running import RunResult, run
    from shortstack.retraining.distill import retrain_distill
    from shortstack.retraining.lora import retrain_lora
    from shortstack.retraining.merge import MergeResult, merge
    from shortstack.retraining.options import TrainingOptions
    from shortstack.retraining.pretrain import retrain_cpt
    from shortstack.retraining.results import RetrainEstimate, RetrainResult
    from shortstack.retraining.teaching import TeachResult, teach
    from shortstack.scores import CriterionScores, Scores, load_scores
    from shortstack.scoring import score

_WHERE = {
    "Agreements": "agreement:Agreements",
    "Checkpoint": "checkpoint.reader:Checkpoint",
    "Comparison": "comparing:Comparison",
    "CriterionScores": "scores:CriterionScores",
    "EvaluationOptions": "evaluation.options:EvaluationOptions",
    "Figure": "evaluation.results:Figure",
    "Info": "information:Info",
    "MergeResult": "retraining.merge:MergeResult",
    "PrunePlan": "plans:PrunePlan",
    "PruneResult": "pruning:PruneResult",
    "Rehearsal": "recipes.rehearsing:Rehearsal",
    "Result": "evaluation.results:Result",
    "Results": "evaluation.results:Results",
    "RetrainEstimate": "retraining.results:RetrainEstimate",
    "RetrainResult": "retraining.results:RetrainResult",
    "RunResult": "recipes.running:RunResult",
    "Scores": "scores:Scores",
    "ShortstackError": "errors:ShortstackError",
    "TeachResult": "retraining.teaching:TeachResult",
    "TrainingOptions": "retraining.options:TrainingOptions",
    "UsageError": "errors:UsageError",
    "agree": "agreement:agree",
    "check": "checking:check",
    "compare": "comparing:compare",
    "evaluate": "evaluation.perplexity:evaluate_ppl",
    "evaluate_all": "evaluation.everything:evaluate_all",
    "evaluate_generation": "evaluation.generation:evaluate_generation",
    "evaluate_ppl": "evaluation.perplexity:evaluate_ppl",
    "evaluate_zeroshot": "evaluation.zeroshot:evaluate_zeroshot",
    "info": "information:info",
    "load_plan": "plans:load_plan",
    "load_results": "evaluation.results:load_results",
    "load_scores": "scores:load_scores",
    "merge": "retraining.merge:merge",
    "open_checkpoint": "checkpoint.reader:open_checkpoint",
    "plan": "planning:plan",
    "prune": "pruning:prune",
    "retrain_cpt": "retraining.pretrain:retrain_cpt",
    "retrain_distill": "retraining.distill:retrain_distill",
    "retrain_lora": "retraining.lora:retrain_lora",
    "run": "recipes.running:run",
    "samples": "evaluation.samples:evaluate_samples",
    "score": "scoring:score",
    "teach": "retraining.teaching:teach",
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
