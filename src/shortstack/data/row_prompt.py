"""What stands around an instruction, as published or from a file, and which tokens of a row the loss counts."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path

from shortstack.common.json_text import read_json
from shortstack.common.options import Options
from shortstack.errors import ShortstackError, UsageError, did_you_mean

_FIELDS = ("prompt_input", "prompt_no_input")
_IGNORED_FIELDS = ("description", "response_split")  # of the same files, for people and for programs that generate
_SENTENCE_ENDS = (".", ":", "?", "!")


@dataclass(frozen=True)
class PromptTemplate:
    """What stands around an instruction.

    Attributes:
        with_input: holds {instruction} and {input}.
        without_input: holds {instruction}, for rows without an input.
    """

    with_input: str
    without_input: str

    def filled(self, instruction: str, given: str) -> str:
        """The prompt of a row."""
        template = self.with_input if given else self.without_input
        return template.format_map({"instruction": instruction, "input": given})


# The Alpaca prompt (tatsu-lab/stanford_alpaca, Apache-2.0), which the published models were trained and are prompted with.
ALPACA = PromptTemplate(
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
)
TEMPLATES = {"alpaca": ALPACA}


@dataclass(frozen=True)
class PromptOptions(Options):
    """How rows become text: the template around instructions, and which tokens the loss counts.

    Attributes:
        prompt_template: The prompt template for rows of instructions: `alpaca`, as published, or a JSON file with
            `prompt_input` and `prompt_no_input`, which contain {instruction} and {input}.
        instruction: Use the prompt template. With `instruction=False`, instruction, input and output are joined without
            it.
        train_on_inputs: Count the tokens of prompts in the loss, too.
        add_eos: End each response with the end-of-text token, if it fits within `cutoff`.
    """

    prompt_template: str = "alpaca"
    instruction: bool = True
    train_on_inputs: bool = False
    add_eos: bool = True

    def __post_init__(self) -> None:
        if not self.instruction and self.prompt_template != "alpaca":
            raise UsageError(
                f"--prompt-template {self.prompt_template} --no-instruction: one requires a template, the other none",
                hint="leave one of them out",
            )

    def read(self) -> PromptRule:
        """With the template's text.

        Raises:
            ShortstackError: there is no such template, or its file is not one.
        """
        template = read_template(self.prompt_template) if self.instruction else None
        return PromptRule(template, self.train_on_inputs, self.add_eos)


@dataclass(frozen=True)
class PromptRule:
    """`PromptOptions`, with the text of the template.

    Attributes:
        template: None where instruction, input and output follow one another.
        train_on_inputs, add_eos: as there.
    """

    template: PromptTemplate | None = ALPACA
    train_on_inputs: bool = False
    add_eos: bool = True

    def prompt_and_text(self, instruction: str, given: str, answer: str) -> tuple[str, str]:
        """(the prompt, the prompt and the answer)."""
        if self.template is not None:
            prompt = self.template.filled(instruction, given)
            return prompt, prompt + answer
        prompt = _as_title(instruction) + " " + (_as_sentence(given) if given else "")
        return prompt, f"{prompt} {answer}"

    def refuse_idle(self, source: str, kind: str) -> None:
        """Refuse options that have no effect on what a source holds.

        Args:
            source: what the user called it.
            kind: what it holds: a key of `_UNAFFECTED`, or anything else.

        Raises:
            UsageError: one of them was given.
        """
        idle_names, why = _UNAFFECTED.get(kind, ((), ""))
        template = "--no-instruction" if self.template is None else "--prompt-template"
        given = {
            template: self.template != ALPACA, "--no-add-eos": not self.add_eos, "--train-on-inputs": self.train_on_inputs
        }  # fmt: skip
        idle = [name for name, is_given in given.items() if is_given and name in idle_names]
        if idle:
            raise UsageError(
                f"{', '.join(idle)}: no effect on {source}: it holds {why}",
                hint=f"leave {'it' if len(idle) == 1 else 'them'} out",
            )


_TEMPLATE = ("--no-instruction", "--prompt-template")
# What a source holds -> options that have no effect on it, and what it holds in words.
_UNAFFECTED = {
    "text": ((*_TEMPLATE, "--no-add-eos", "--train-on-inputs"), "text, all of which is trained on"),
    "chats": ((*_TEMPLATE, "--no-add-eos"), "chats, which the tokenizer's own template renders"),
    "joined": (_TEMPLATE, "prompts and completions, which are joined unchanged"),
}


AS_PUBLISHED = PromptRule()


def read_template(name: str) -> PromptTemplate:
    """A template by name or from a JSON file.

    Raises:
        ShortstackError: there is no such template, or its file is not one.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name).expanduser()
    if not path.is_file():
        raise UsageError(
            f"--prompt-template {name}: neither the name of a template nor a file",
            hint=did_you_mean(name, TEMPLATES, otherwise=f"known: {', '.join(TEMPLATES)}; or a JSON file"),
        )
    try:
        found = read_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ShortstackError(f"{path}: the template cannot be read ({error})", hint=_form()) from None
    if not isinstance(found, dict) or set(_FIELDS) - found.keys():
        raise ShortstackError(f"{path}: not a prompt template", hint=_form())
    if unknown := sorted(found.keys() - {*_FIELDS, *_IGNORED_FIELDS}):
        raise ShortstackError(f"{path}: {unknown[0]!r} is not a key of a prompt template", hint=_form())
    _check_holds(path, found, "prompt_input", {"instruction", "input"})
    _check_holds(path, found, "prompt_no_input", {"instruction"})
    return PromptTemplate(found["prompt_input"], found["prompt_no_input"])


def _check_holds(path: Path, found: dict[str, object], name: str, expected: set[str]) -> None:
    """Each of `expected` stands in the text, in braces, and nothing else does."""
    text = found[name]
    if not isinstance(text, str):
        raise ShortstackError(f"{path}: {name} is {text!r:.60}, expected a string", hint=_form())
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ShortstackError(f"{path}: {name}: {error}", hint="write a brace twice where it is text") from None
    holds = {field for _, field, _, _ in parts if field is not None}
    plain = not any(form or conversion for _, _, form, conversion in parts)
    if holds != expected or not plain:
        wanted = " and ".join(f"{{{field}}}" for field in sorted(expected, reverse=True))
        there = ", ".join(f"{{{field}}}" for field in sorted(holds)) or "nothing"
        raise ShortstackError(
            f"{path}: {name} holds {there} in braces, expected {wanted}", hint="write a brace twice where it is text"
        )


def _form() -> str:
    return 'expected {"prompt_input": "... {instruction} ... {input} ...", "prompt_no_input": "... {instruction} ..."}'


def _as_title(instruction: str) -> str:
    """As published without a template: a colon behind an instruction that ends in a full stop or in nothing."""
    if instruction.endswith("."):
        return f"{instruction[:-1]}:"
    return instruction if instruction.endswith(_SENTENCE_ENDS) else f"{instruction}:"


def _as_sentence(given: str) -> str:
    return given if given.endswith(_SENTENCE_ENDS) else f"{given}."
