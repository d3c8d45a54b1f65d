"""Tasks with one right answer, made by a seeded generator: arithmetic and copying, which break first in a pruned model."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

_SHOWN = 3  # solved examples in front of each question
_WORDS = (
    "apple", "bridge", "candle", "desert", "engine", "feather", "garden", "hammer", "island", "jacket", "kettle",
    "ladder", "mirror", "needle", "orange", "pencil", "quarter", "river", "saddle", "table", "umbrella", "valley",
    "window", "yellow", "zebra",
)  # fmt: skip


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
