"""The verbs of shortstack: one table for the command line, for recipes, and for the documents."""

from __future__ import annotations

from typing import NamedTuple


class Verb(NamedTuple):
    """One command.

    Attributes:
        function: module:name of the stage function.
        line: what it does: the first sentence of the function's docstring, which a test compares.
        example: a command that shows it, which a test runs.
    """

    function: str
    line: str
    example: str


VERBS: dict[str, Verb] = {
    "quickstart": Verb(
        "shortstack.recipes.quickstart:quickstart",
        "Take the small model in the package through info, score, plan, prune, retrain and evaluate.",
        "shortstack quickstart --out tour",
    ),
    "info": Verb(
        "shortstack.inspection.info:info",
        "Show what a checkpoint is: family, blocks, parameters, sizes, and what one block less saves.",
        "shortstack info MODEL",
    ),
    "check": Verb(
        "shortstack.inspection.check:check",
        "Check that a checkpoint loads and generates as it should, whoever made it.",
        "shortstack check MODEL",
    ),
    "families": Verb(
        "shortstack.inspection.families:families",
        "Show which model families can be shortened exactly, which are refused, and why.",
        "shortstack families",
    ),
    "score": Verb(
        "shortstack.scoring.score:score",
        "Measure how much each block matters.",
        "shortstack score MODEL --data calibration.txt --criterion ppl,taylor,magnitude --out scores.json",
    ),
    "agree": Verb(
        "shortstack.scoring.agreement:agree",
        "Say how far rankings of blocks agree: Kendall's tau, and the overlap of the blocks they would remove.",
        "shortstack agree scores.json --remove 6",
    ),
    "plan": Verb(
        "shortstack.pruning.plan:plan",
        "Choose the blocks to remove, and show what that saves.",
        "shortstack plan MODEL --scores scores.json --criterion ppl --remove 6 --out plan.json",
    ),
    "prune": Verb(
        "shortstack.pruning.prune:prune",
        "Write a checkpoint without some of the blocks: the bytes of every kept tensor as they were.",
        "shortstack prune MODEL --plan plan.json --verify --out PRUNED",
    ),
    "retrain lora": Verb(
        "shortstack.retraining.lora:retrain_lora",
        "Train a LoRA adapter on a checkpoint, and merge it into a plain one.",
        "shortstack retrain lora PRUNED --data rows.json --eval-data evaluation.txt --out HEALED",
    ),
    "retrain cpt": Verb(
        "shortstack.retraining.cpt:retrain_cpt",
        "Train a checkpoint further on text, as in pretraining.",
        "shortstack retrain cpt PRUNED --data text.jsonl --tokens 1B --out TRAINED",
    ),
    "retrain distill": Verb(
        "shortstack.retraining.distill:retrain_distill",
        "Train a pruned checkpoint on what the dense one says: on its logits, and on its hidden states if asked for.",
        "shortstack retrain distill PRUNED --teacher MODEL --data text.jsonl --out TAUGHT",
    ),
    "merge": Verb(
        "shortstack.retraining.merge:merge",
        "Fold a PEFT adapter into its base checkpoint, and write a plain checkpoint.",
        "shortstack merge HEALED/adapter --base PRUNED --out MERGED",
    ),
    "teach": Verb(
        "shortstack.retraining.teach:teach",
        "Write down a teacher's top logits on a text, for distillation without the teacher.",
        "shortstack teach MODEL --data text.jsonl --top-k 64 --out NOTES",
    ),
    "eval ppl": Verb(
        "shortstack.evaluation.ppl:evaluate_ppl",
        "Perplexity of checkpoints on texts, with standard errors.",
        "shortstack eval ppl MODEL PRUNED HEALED --data evaluation.txt --out ppl.json",
    ),
    "eval zeroshot": Verb(
        "shortstack.evaluation.zeroshot:evaluate_zeroshot",
        "Zero-shot accuracy of checkpoints on the seven published tasks, and their mean.",
        "shortstack eval zeroshot MODEL PRUNED --tasks-dir tasks --limit 200 --out zeroshot.json",
    ),
    "eval generation": Verb(
        "shortstack.evaluation.generation:evaluate_generation",
        "Health of what checkpoints write: repetition, end of text, foreign script, perplexity under the dense model.",
        "shortstack eval generation MODEL PRUNED --out generation.json",
    ),
    "eval samples": Verb(
        "shortstack.evaluation.samples:evaluate_samples",
        "Continuations of one prompt by each checkpoint, with the same seed.",
        "shortstack eval samples MODEL PRUNED --prompt 'Once upon a time' --new-tokens 40",
    ),
    "eval all": Verb(
        "shortstack.evaluation.all:evaluate_all",
        "Perplexity, zero-shot accuracy, generation health and samples of checkpoints, in one file.",
        "shortstack eval all MODEL PRUNED --data evaluation.txt --tasks-dir tasks --out results.json",
    ),
    "compare": Verb(
        "shortstack.evaluation.compare:compare",
        "Set the results of several models side by side, with differences and their paired standard errors.",
        "shortstack compare ppl.json zeroshot.json --published st-vicuna-v1.3-5.5b-ppl",
    ),
    "run": Verb(
        "shortstack.recipes.run:run",
        "Run a recipe: a pipeline of stages, by its name in the package or from a YAML file of your own.",
        "shortstack run vicuna-7b-ppl --model MODEL --out RUN --dry-run",
    ),
    "recipes": Verb(
        "shortstack.recipes.listing:recipes",
        "List the recipes in the package; show one in full, or the JSON schema for editors.",
        "shortstack recipes vicuna-7b-ppl",
    ),
}
# Verbs of verbs, with their line.
GROUPS = {
    "retrain": "Train a pruned checkpoint until it is well again: LoRA, continued pretraining, distillation.",
    "eval": "Evaluate checkpoints: perplexity, zero-shot accuracy, generation health, samples.",
}
