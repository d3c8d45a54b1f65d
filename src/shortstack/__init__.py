"""shortstack: make the stack of Transformer blocks of a language model shorter.

Every command is a function here (`score`, `plan`, `prune`, `retrain_lora`, ..., `run`), under the name that its row in
registry.py gives it; beside them stand the records that they take and return. Names are imported when they are first
used, so that `import shortstack` takes no time. `__init__.pyi` tells type checkers; scripts/make_docs.py writes it.
"""

import sys
from typing import Any

from shortstack.registry import public_commands

# The records that stages take and return, and what reads them.
RECORDS = {
    "Agreements": "scoring.agreement",
    "BlockChoice": "pruning.options",
    "CalibrationOptions": "data.calibration",
    "Checkpoint": "checkpoint.reader",
    "Comparison": "evaluation.comparison",
    "CriterionScores": "artifacts.scores",
    "DistillationSteps": "retraining.options",
    "EvaluationOptions": "evaluation.options",
    "Figure": "artifacts.results",
    "GenerationOptions": "evaluation.options",
    "Info": "inspection.info",
    "LoRA": "retraining.options",
    "MergeResult": "retraining.merge",
    "PruneChoice": "pruning.options",
    "PruneOptions": "pruning.options",
    "PrunePlan": "artifacts.plan",
    "PruneResult": "pruning.prune",
    "Rehearsal": "recipes.dry_run",
    "Result": "artifacts.results",
    "Results": "artifacts.results",
    "RetrainEstimate": "retraining.results",
    "RetrainResult": "retraining.results",
    "RowSteps": "retraining.options",
    "RunOptions": "recipes.run",
    "RunResult": "recipes.run",
    "SampleRequest": "evaluation.samples",
    "ScoreOptions": "scoring.options",
    "Scores": "artifacts.scores",
    "ShortstackError": "errors",
    "StoppingOptions": "scoring.options",
    "TaskOptions": "evaluation.options",
    "TeachOptions": "retraining.options",
    "TeachResult": "retraining.teach",
    "Teaching": "retraining.options",
    "TextOptions": "evaluation.options",
    "TextSteps": "retraining.options",
    "TrainingOptions": "retraining.options",
    "UsageError": "errors",
    "load_plan": "artifacts.plan",
    "load_results": "artifacts.results",
    "load_scores": "artifacts.scores",
    "open_checkpoint": "families.open_model",
}

__all__ = sorted([*RECORDS, *public_commands()])


def __getattr__(name: str) -> Any:
    import importlib

    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("shortstack")
    if sys.platform == "win32" and name in __all__ and not name.endswith("Error"):
        from shortstack.errors import NO_WINDOWS, ShortstackError

        raise ShortstackError(NO_WINDOWS[0], hint=NO_WINDOWS[1])
    if name in RECORDS:
        return getattr(importlib.import_module(f"shortstack.{RECORDS[name]}"), name)
    commands = public_commands()
    if name in commands:
        return commands[name].public
    raise AttributeError(f"module 'shortstack' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
