"""Every command of shortstack, a row each: command line, recipes, names in Python, extras and documents follow from it.

A new command is a stage function and a row here. Its options are nowhere else than in the function's signature, in the
records that it takes, and in their docstrings (common/options.py).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from shortstack.common.extras import missing_packages, need_packages
from shortstack.common.keywords import errors_in_python
from shortstack.common.options import Option, call_with, options_of, records_of

# What a step of a recipe leaves behind for later ones.
Kind = Literal["checkpoint", "adapter", "scores", "plan", "teacher logits", "results", "report", "text"]


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: as on the command line.
        function: module:name of the stage function.
        summary: the first sentence of the function's docstring, which a test compares.
        example: a command that shows it, which a test runs.
        api: its name in Python, as `shortstack.NAME`: by default the function's own; "-" where it has none. No room's name.
        step: a recipe can have it as a step.
        makes: what a step leaves behind for later ones, and where in the step's folder; the first is OUT ("" where OUT is
            the folder itself). Empty where the function writes nothing, and the run writes what it returned.
        unless: what is not made where an option has this value.
        parallel: processes that were started together work on it together.
        needs: import names of packages beyond the core.
        extra: the extra that installs them.
        check: module:name of a function that looks, before anything runs, at what the options name: values by option name
            (a model as a `Forecast`) -> lines about what could not be looked at; it raises what is wrong.
        estimate: module:name of a function that foresees what a step leaves behind: values -> `Estimate`.
    """

    name: str
    function: str
    summary: str
    example: str
    api: str = ""
    step: bool = True
    makes: Mapping[Kind, str] = field(default_factory=dict)
    unless: Mapping[Kind, tuple[str, Any]] = field(default_factory=dict)
    parallel: bool = False
    needs: tuple[str, ...] = ()
    extra: str = ""
    check: str = ""
    estimate: str = ""

    @property
    def identifier(self) -> str:
        """Its name as an identifier."""
        return self.name.replace(" ", "_").replace("-", "_")

    @property
    def public_name(self) -> str:
        """Its name in Python; "" where it has none."""
        return "" if self.api == "-" else self.api or self.function.partition(":")[2]

    @functools.cached_property
    def stage(self) -> Callable[..., Any]:
        """The stage function, which is imported now."""
        return _imported(self.function)

    @property
    def options(self) -> dict[str, Option]:
        """Everything that the function takes, by name."""
        return options_of(self.stage)

    @property
    def public(self) -> Callable[..., Any]:
        """The function as `shortstack.NAME`: errors name keywords, missing packages are one line instead of a traceback."""
        stage = self.stage

        @functools.wraps(stage)
        def called(*positional: Any, **given: Any) -> Any:
            self.need_packages()
            with errors_in_python(self.options, given):
                return stage(*positional, **given)

        return called

    def call(self, values: Mapping[str, Any]) -> Any:
        """Call the function with values by option name.

        Raises:
            UsageError: a package that it needs is not installed.
        """
        self.need_packages()
        return call_with(self.stage, values)

    def check_options(self, values: Mapping[str, Any]) -> None:
        """Refuse values that contradict one another or are out of range, before anything runs.

        Raises:
            UsageError: they are.
        """
        records_of(self.stage, values)

    def makes_with(self, values: Mapping[str, Any]) -> dict[Kind, str]:
        """What a step with these values leaves behind, and where."""
        return {
            kind: place
            for kind, place in self.makes.items()
            if kind not in self.unless or values.get(self.unless[kind][0]) != self.unless[kind][1]
        }

    def look_ahead(self, kind: Literal["check", "estimate"]) -> Callable[[Mapping[str, Any]], Any] | None:
        """The function that checks or estimates, where there is one."""
        where = self.check if kind == "check" else self.estimate
        return _imported(where) if where else None

    @property
    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        return missing_packages(self.needs)

    @property
    def install(self) -> str:
        """What to give to pip where one is missing."""
        return f"'shortstack[{self.extra}]'" if self.extra else " ".join(self.needs)

    def need_packages(self) -> None:
        """Say now, rather than after the work, that a package is missing.

        Raises:
            UsageError: one is not installed; with the command that installs it.
        """
        need_packages(self.name, *self.needs, extra=self.extra)


def _imported(where: str) -> Callable[..., Any]:
    module, _, name = where.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


_ROWS = [
    Command(
        "quickstart",
        "shortstack.recipes.quickstart:quickstart",
        "Take the small model in the package through info, score, plan, prune, retrain, evaluate and report.",
        "shortstack quickstart --out tour",
        step=False,
        api="-",
    ),
    Command(
        "info",
        "shortstack.inspection.info:info",
        "Show what a checkpoint is: family, blocks, parameters, sizes, and what one block less saves.",
        "shortstack info MODEL",
    ),
    Command(
        "check",
        "shortstack.inspection.check:check",
        "Check that a checkpoint loads and generates as it should, whoever made it.",
        "shortstack check MODEL",
    ),
    Command(
        "doctor",
        "shortstack.inspection.doctor:doctor",
        "Show versions, devices, extras, engines, and the caches with their sizes: what a report of a fault should hold.",
        "shortstack doctor",
        step=False,
    ),
    Command(
        "families",
        "shortstack.inspection.families:families",
        "Show which model families can be shortened exactly, which are refused, and why.",
        "shortstack families",
        step=False,
        api="-",
    ),
    Command(
        "score",
        "shortstack.scoring.score:score",
        "Measure how much each block matters.",
        "shortstack score MODEL --data calibration.txt --criterion ppl,taylor,magnitude --out scores.json",
        makes={"scores": "scores.json"},
        parallel=True,
        check="shortstack.scoring.score:check_score",
        estimate="shortstack.scoring.score:estimate_score",
    ),
    Command(
        "agree",
        "shortstack.scoring.agreement:agree",
        "Say how far rankings of blocks agree: Kendall's tau, and the overlap of the blocks they would remove.",
        "shortstack agree scores.json --remove 6",
        makes={"text": "agreement.json"},
    ),
    Command(
        "plan",
        "shortstack.pruning.plan:plan",
        "Choose the blocks to remove, and show what that saves.",
        "shortstack plan MODEL --scores scores.json --criterion ppl --remove 6 --out plan.json",
        makes={"plan": "plan.json"},
        estimate="shortstack.pruning.estimate:estimate_plan",
    ),
    Command(
        "prune",
        "shortstack.pruning.prune:prune",
        "Write a checkpoint without some of the blocks: the bytes of every kept tensor as they were.",
        "shortstack prune MODEL --plan plan.json --verify --out PRUNED",
        makes={"checkpoint": ""},
        estimate="shortstack.pruning.estimate:estimate_prune",
    ),
    Command(
        "retrain lora",
        "shortstack.retraining.lora:retrain_lora",
        "Train a LoRA adapter on a checkpoint, and merge it into a plain one.",
        "shortstack retrain lora PRUNED --data rows.json --eval-data evaluation.txt --out HEALED",
        makes={"checkpoint": "", "adapter": "adapter"},
        unless={"checkpoint": ("merge", False)},
        parallel=True,
        needs=(
            "accelerate",
            "peft",
        ),
        extra="retrain",
        check="shortstack.retraining.lora:check_lora",
        estimate="shortstack.retraining.estimate:estimate_lora",
    ),
    Command(
        "retrain cpt",
        "shortstack.retraining.cpt:retrain_cpt",
        "Train a checkpoint further on text, as in pretraining.",
        "shortstack retrain cpt PRUNED --data text.jsonl --tokens 1B --out TRAINED",
        makes={"checkpoint": ""},
        parallel=True,
        needs=("accelerate",),
        extra="retrain",
        check="shortstack.retraining.cpt:check_cpt",
        estimate="shortstack.retraining.estimate:estimate_training",
    ),
    Command(
        "retrain distill",
        "shortstack.retraining.distill:retrain_distill",
        "Train a pruned checkpoint on what the dense one says: on its logits, and on its hidden states if asked for.",
        "shortstack retrain distill PRUNED --teacher MODEL --data text.jsonl --out TAUGHT",
        makes={"checkpoint": ""},
        parallel=True,
        needs=("accelerate",),
        extra="retrain",
        check="shortstack.retraining.distill:check_distill",
        estimate="shortstack.retraining.estimate:estimate_training",
    ),
    Command(
        "merge",
        "shortstack.retraining.merge:merge",
        "Fold a PEFT adapter into its base checkpoint, and write a plain checkpoint.",
        "shortstack merge HEALED/adapter --base PRUNED --out MERGED",
        makes={"checkpoint": ""},
        needs=("peft",),
        extra="retrain",
        estimate="shortstack.retraining.estimate:estimate_merge",
    ),
    Command(
        "teach",
        "shortstack.retraining.teach:teach",
        "Write down a teacher's top logits on a text, for distillation without the teacher.",
        "shortstack teach MODEL --data text.jsonl --top-k 64 --out NOTES",
        makes={"teacher logits": ""},
        check="shortstack.retraining.estimate:check_training",
        estimate="shortstack.retraining.estimate:estimate_teach",
    ),
    Command(
        "quantize",
        "shortstack.quantization.quantize:quantize",
        "Store the weights of a checkpoint in fewer bits, by GPTQ or a simpler scheme, with llm-compressor.",
        "shortstack quantize PRUNED --data calibration.txt --out QUANTIZED",
        makes={"checkpoint": ""},
        needs=("llmcompressor",),
        extra="quantize",
        check="shortstack.quantization.quantize:check_quantize",
        estimate="shortstack.quantization.quantize:estimate_quantize",
    ),
    Command(
        "eval ppl",
        "shortstack.evaluation.ppl:evaluate_ppl",
        "Perplexity of checkpoints on texts, with standard errors.",
        "shortstack eval ppl MODEL PRUNED HEALED --data evaluation.txt --out ppl.json",
        makes={"results": "results.json"},
        check="shortstack.evaluation.ppl:check_texts",
    ),
    Command(
        "eval zeroshot",
        "shortstack.evaluation.zeroshot:evaluate_zeroshot",
        "Zero-shot accuracy of checkpoints on the seven published tasks, and their mean.",
        "shortstack eval zeroshot MODEL PRUNED --tasks-dir tasks --limit 200 --out zeroshot.json",
        makes={"results": "results.json"},
        needs=("lm_eval",),
        extra="eval",
        check="shortstack.evaluation.zeroshot:check_tasks",
    ),
    Command(
        "eval generation",
        "shortstack.evaluation.generation:evaluate_generation",
        "Health of what checkpoints write: repetition, end of text, foreign script, perplexity under the dense model.",
        "shortstack eval generation MODEL PRUNED --out generation.json",
        makes={"results": "results.json"},
    ),
    Command(
        "eval samples",
        "shortstack.evaluation.samples:evaluate_samples",
        "Continuations of one prompt by each checkpoint, with the same seed.",
        "shortstack eval samples MODEL PRUNED --prompt 'Once upon a time' --new-tokens 40",
        makes={"results": "results.json"},
        api="samples",
        check="shortstack.evaluation.samples:check_positions",
    ),
    Command(
        "eval all",
        "shortstack.evaluation.all:evaluate_all",
        "Perplexity, zero-shot accuracy, generation health and samples of checkpoints, in one file.",
        "shortstack eval all MODEL PRUNED --data evaluation.txt --tasks-dir tasks --out results.json",
        makes={"results": "results.json"},
        needs=("lm_eval",),
        extra="eval",
        check="shortstack.evaluation.all:check_all",
    ),
    Command(
        "compare",
        "shortstack.evaluation.compare:compare",
        "Set the results of several models side by side, with differences and their paired standard errors.",
        "shortstack compare ppl.json zeroshot.json --published st-vicuna-v1.3-5.5b-ppl",
        makes={"text": "comparison.json"},
        check="shortstack.evaluation.compare:check_published",
    ),
    Command(
        "bench",
        "shortstack.benchmark.bench:bench",
        "Measure latency, throughput, memory and utilisation of checkpoints, in the engines that people use.",
        "shortstack bench MODEL PRUNED --batch 1,8 --new-tokens 64 --compare --out bench.json",
        makes={"results": "results.json"},
        check="shortstack.benchmark.bench:check_bench",
        estimate="shortstack.benchmark.bench:estimate_bench",
    ),
    Command(
        "report",
        "shortstack.publishing.report.report:report",
        "Write a report of a run as one HTML file: what was removed and why, what it cost, and how to do it again.",
        "shortstack report scores.json ppl.json PRUNED --out report.html",
        makes={"report": "report.html"},
        check="shortstack.publishing.report.report:check_report",
    ),
    Command(
        "card",
        "shortstack.publishing.card:card",
        "Renew the model card of a checkpoint that shortstack made, with the figures of results files.",
        "shortstack card PRUNED ppl.json",
        step=False,
    ),
    Command(
        "push",
        "shortstack.publishing.push:push",
        "Push a checkpoint that shortstack made to the hub; without --yes only show what would be pushed.",
        "shortstack push PRUNED org/name",
        step=False,
    ),
    Command(
        "demo",
        "shortstack.demo.app:demo",
        "Serve a page on which up to four checkpoints write the same prompt on, side by side, until it is interrupted.",
        "shortstack demo embedded pruned --scores scores.json",
        api="serve_demo",
        step=False,
        needs=("gradio",),
        extra="demo",
    ),
    Command(
        "run",
        "shortstack.recipes.run:run",
        "Run a recipe: a pipeline of stages, by its name in the package or from a YAML file of your own.",
        "shortstack run vicuna-7b-ppl --model MODEL --out RUN --dry-run",
        step=False,
    ),
    Command(
        "recipes",
        "shortstack.recipes.listing:recipes",
        "List the recipes in the package; show one in full, or the JSON schema for editors.",
        "shortstack recipes vicuna-7b-ppl",
        step=False,
        api="-",
    ),
]
COMMANDS: dict[str, Command] = {command.name: command for command in _ROWS}
# Commands of several words begin with one of these; with its line.
GROUPS = {
    "retrain": "Train a pruned checkpoint until it is well again: LoRA, continued pretraining, distillation.",
    "eval": "Evaluate checkpoints: perplexity, zero-shot accuracy, generation health, samples.",
}


def public_commands() -> dict[str, Command]:
    """Name in Python -> command."""
    named = {command.public_name: command for command in COMMANDS.values() if command.public_name}
    return {**named, "evaluate": COMMANDS["eval ppl"]}  # the evaluation that everybody runs
