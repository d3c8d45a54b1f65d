"""What every model is asked to continue: prompts of shortstack's own or of a file, and probes with one right answer."""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from shortstack.common.assets import ASSETS
from shortstack.common.json_text import json_text
from shortstack.data.files import TEXT_SUFFIXES, suffix_of
from shortstack.data.sources import file_rows, required_text
from shortstack.errors import ShortstackError, system_reason

_SHOWN = 3  # solved examples in front of each question
_WORDS = (
    "apple", "bridge", "candle", "desert", "engine", "feather", "garden", "hammer", "island", "jacket", "kettle",
    "ladder", "mirror", "needle", "orange", "pencil", "quarter", "river", "saddle", "table", "umbrella", "valley",
    "window", "yellow", "zebra",
)  # fmt: skip
_PROMPTS = ASSETS / "prompts.json"
NEW_TOKENS, PROBES = 96, 40
DECODINGS = ("greedy", "drawn")  # how every prompt is continued


@dataclass(frozen=True)
class Probe:
    """One question.

    Attributes:
        kind: arithmetic or copying.
        prompt: solved examples, and the question.
        answer: what must come next, up to the end of the line.
    """

    kind: str
    prompt: str
    answer: str

    def is_right(self, continuation: str) -> bool:
        """Whether the first line of a continuation is the answer, and nothing else."""
        line = continuation.strip(" ").split("\n")[0].strip()
        if self.kind == "arithmetic":
            found = re.match(r"-?\d+", line)
            return found is not None and found.group() == self.answer
        return line == self.answer


def make_probes(count: int, seed: int) -> list[Probe]:
    """So many questions of each kind; the same for the same seed."""
    generator = random.Random(seed)
    return [_arithmetic(generator) for _ in range(count)] + [_copying(generator) for _ in range(count)]


def _arithmetic(generator: random.Random) -> Probe:
    sign, largest = generator.choice([("+", 9), ("+", 99), ("-", 20), ("*", 9)])
    *shown, (question, answer) = [_sum(generator, sign, largest) for _ in range(_SHOWN + 1)]
    lines = [f"{solved} {result}" for solved, result in shown]
    return Probe("arithmetic", "\n".join([*lines, question]), answer)


def _sum(generator: random.Random, sign: str, largest: int) -> tuple[str, str]:
    first, second = generator.randint(1, largest), generator.randint(1, largest)
    if sign == "-":
        first, second = max(first, second), min(first, second)
    result = {"+": first + second, "-": first - second, "*": first * second}[sign]
    return f"{first} {sign} {second} =", str(result)


def _copying(generator: random.Random) -> Probe:
    length = generator.randint(1, 5)
    *shown, last = [" ".join(generator.sample(_WORDS, length)) for _ in range(_SHOWN + 1)]
    lines = [f"{words} -> {words}" for words in shown]
    return Probe("copying", "\n".join([*lines, f"{last} ->"]), last)


@dataclass(frozen=True)
class GenerationRequest:
    """What is asked of every model.

    Attributes:
        prompts: rows of `register` and `text`.
        probes: questions with one right answer.
    """

    prompts: list[dict[str, str]]
    source: str
    new_tokens: int
    probes: list[Probe]
    seed: int

    @classmethod
    def read(
        cls, prompts: Path | None = None, new_tokens: int = NEW_TOKENS, probes: int = PROBES, seed: int = 1234
    ) -> GenerationRequest:
        """The prompts of a file, or shortstack's own.

        Raises:
            ShortstackError: the file cannot be read, or holds no prompt.
        """
        rows = json.loads(_PROMPTS.read_bytes()) if prompts is None else _prompts_of(Path(prompts))
        source = "shortstack's own prompts" if prompts is None else str(prompts)
        return cls(rows, source, new_tokens, make_probes(probes, seed), seed)

    @property
    def sha256(self) -> str:
        """Of all that is asked."""
        asked = [self.prompts, [[probe.prompt, probe.answer] for probe in self.probes], self.new_tokens, self.seed]
        return hashlib.sha256(json_text(asked).encode()).hexdigest()


def _prompts_of(file: Path) -> list[dict[str, str]]:
    try:
        if suffix_of(file) in TEXT_SUFFIXES:
            texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            texts = []
            for place, row in file_rows(file):
                texts.append(required_text(file, place, row))
                if not texts[-1]:
                    raise ShortstackError(f"{file}, {place}: no text", hint="give each row the field text")
    except OSError as error:
        raise ShortstackError(f"{file}: cannot be read ({system_reason(error)})") from None
    except UnicodeDecodeError as error:
        raise ShortstackError(f"{file}: not UTF-8 at byte {error.start}", hint="convert the file to UTF-8") from None
    if not texts:
        raise ShortstackError(f"{file}: no prompts", hint="give a .txt file with one prompt per line, or rows of text")
    return [{"register": "given", "text": text} for text in texts]
