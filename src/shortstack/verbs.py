"""The verbs of shortstack: one table for the command line, for recipes, and for the documents."""

from __future__ import annotations

# Verb -> (function, one line for the overview: the first sentence of its docstring, which a test compares).
VERBS = {
    "quickstart": (
        "shortstack.quickstart:quickstart",
        "Take the small model in the package through info, score, plan, prune, retrain and evaluate.",
    ),
    "info": (
        "shortstack.information:info",
        "Show what a checkpoint is: family, blocks, parameters, sizes, and what one block less saves.",
    ),
    "check": (
        "shortstack.checking:check",
        "Check that a checkpoint loads and generates as it should, whoever made it.",
    ),
    "families": (
        "shortstack.families:families",
        "Show which model families can be shortened exactly, which are refused, and why.",
    ),
    "score": ("shortstack.scoring:score", "Measure how much each block matters."),
    "plan": ("shortstack.planning:plan", "Choose the blocks to remove, and show what that saves."),
    "prune": (
        "shortstack.pruning:prune",
        "Write a checkpoint without some of the blocks: the bytes of every kept tensor as they were.",
    ),
    "retrain lora": (
        "shortstack.retraining.lora:retrain_lora",
        "Train a LoRA adapter on a checkpoint, and merge it into a plain one.",
    ),
    "retrain cpt": (
        "shortstack.retraining.pretrain:retrain_cpt",
        "Train a checkpoint further on text, as in pretraining.",
    ),
    "retrain distill": (
        "shortstack.retraining.distill:retrain_distill",
        "Train a pruned checkpoint on what the dense one says: on its logits, and on its hidden states if asked for.",
    ),
    "merge": (
        "shortstack.retraining.merge:merge",
        "Fold a PEFT adapter into its base checkpoint, and write a plain checkpoint.",
    ),
    "teach": (
        "shortstack.retraining.teaching:teach",
        "Write down a teacher's top logits on a text, for distillation without the teacher.",
    ),
    "eval ppl": (
        "shortstack.evaluation.perplexity:evaluate_ppl",
        "Perplexity of checkpoints on texts, with standard errors.",
    ),
    "eval zeroshot": (
        "shortstack.evaluation.zeroshot:evaluate_zeroshot",
        "Zero-shot accuracy of checkpoints on the seven published tasks, and their mean.",
    ),
    "eval generation": (
        "shortstack.evaluation.generation:evaluate_generation",
        "Health of what checkpoints write: repetition, end of text, foreign script, perplexity under the dense model.",
    ),
    "eval samples": (
        "shortstack.evaluation.samples:evaluate_samples",
        "Continuations of one prompt by each checkpoint, with the same seed.",
    ),
    "eval all": (
        "shortstack.evaluation.everything:evaluate_all",
        "Perplexity, zero-shot accuracy, generation health and samples of checkpoints, in one file.",
    ),
    "agree": (
        "shortstack.agreement:agree",
        "Say how far rankings of blocks agree: Kendall's tau, and the overlap of the blocks they would remove.",
    ),
    "run": (
        "shortstack.recipes.running:run",
        "Run a recipe: a pipeline of stages, by its name in the package or from a YAML file of your own.",
    ),
    "recipes": (
        "shortstack.recipes.listing:recipes",
        "List the recipes in the package; show one in full, or the JSON schema for editors.",
    ),
    "compare": (
        "shortstack.comparing:compare",
        "Set the results of several models side by side, with differences and their paired standard errors.",
    ),
}
# Commands of commands, with their line.
GROUPS = {
    "retrain": "Train a pruned checkpoint until it is well again: LoRA, continued pretraining, distillation.",
    "eval": "Evaluate checkpoints: perplexity, zero-shot accuracy, generation health, samples.",
}
