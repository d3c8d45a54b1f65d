"""The command line: stage functions as commands, with the options that their signatures and docstrings define.

Commands are imported when they are run. A stage returns a result that knows its text and its JSON; this module prints
it, and turns errors into one or two lines and an exit code: 0 done, 1 a clear error, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

from cyclopts import App, Group, Parameter

from shortstack.errors import ShortstackError, UsageError
from shortstack.tables import plain

_EVERYWHERE = Group("Options of every command", sort_key=10)

# Command -> (function, one line for the overview: the first sentence of its docstring, which a test compares).
COMMANDS = {
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


def run(argv: list[str]) -> int:
    """Run one command and return its exit code."""
    wants_json, debug = False, False
    app = _app()
    app.meta.suppress_keyboard_interrupt = False

    @app.meta.default
    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        json: Annotated[bool, Parameter(negative="", group=_EVERYWHERE, help="print the result as JSON.")] = False,
        debug_: Annotated[
            bool, Parameter("--debug", negative="", group=_EVERYWHERE, help="show an error's traceback.")
        ] = False,
    ) -> Any:
        nonlocal wants_json, debug
        wants_json, debug = json, debug_
        return app(tokens, result_action="return_value", exit_on_error=False)

    from cyclopts import CycloptsError

    _quiet_libraries()
    try:
        result = app.meta(argv, result_action="return_value", exit_on_error=False)
        if result is not None:
            _print_result(result, wants_json)
            return int(getattr(result, "exit_code", 0))
    except CycloptsError:  # cyclopts has said what is wrong
        return 2
    except (Exception, KeyboardInterrupt) as error:
        code = explained(error)
        if code is None or debug:
            raise
        return code
    return 0


def explained(error: BaseException) -> int | None:
    """Say on one or two lines what went wrong; the exit code, or None for what no user can cause."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    if isinstance(error, ShortstackError):
        print(plain("error: " + error.message), file=sys.stderr)
        if error.hint:
            print(plain("hint: " + error.hint), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, MemoryError):
        print("error: out of memory\nhint: --memory streamed, fewer --samples, or a smaller --seq-len", file=sys.stderr)
        return 1
    return None


def _app() -> App:
    app = App(
        name="shortstack",
        help="Make the stack of Transformer blocks of a language model shorter: measure, remove, and show what it cost.",
        version=_version,
        help_format="plaintext",
        default_parameter=Parameter(negative_iterable=(), show_default=_shown_default),
        suppress_keyboard_interrupt=False,
    )
    groups = {name: App(name=name, help=line) for name, line in GROUPS.items()}
    for name, (function, line) in COMMANDS.items():
        parent, _, last = name.rpartition(" ")
        if parent and parent not in app:
            app.command(groups[parent])
        (groups[parent] if parent else app).command(function, name=last, help=line)
    return app


def _shown_default(value: Any) -> Any:
    """Defaults are shown where they say something: not for switches that are off."""
    return None if value is False else value


def _version() -> str:
    import shortstack

    return str(shortstack.__version__)


def _print_result(result: Any, wants_json: bool) -> None:
    if wants_json:
        import json

        print(json.dumps(result.to_json(), indent=1))
        return
    text = "\n".join(plain(line) for line in result.to_text().split("\n"))
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ and hasattr(result, "coloured"):
        text = result.coloured(text)
    print(text)


def _quiet_libraries() -> None:
    """Keep what libraries say (progress, advice) off the terminal, unless the user asked for it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own bars are asked for by name
