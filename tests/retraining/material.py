"""Small data to train pico models on, made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = [
    *("the", "with", "while", "yield", "import", "from", "class", "def"),
    *("return", "lambda", "block", "layer", "head", "norm", "token", "window"),
]


def sentence(generator: random.Random, words: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(words))


def instructions(path: Path, rows: int = 24, seed: int = 0) -> Path:
    generator = random.Random(seed)
    made = [
        {
            "instruction": sentence(generator, 2),
            "input": sentence(generator, 1) if number % 2 else "",
            "output": sentence(generator, 1 + number % 4),
        }
        for number in range(rows)
    ]
    path.write_text(json.dumps(made))
    return path


def texts(path: Path, rows: int = 60, words: int = 60, seed: int = 0) -> Path:
    generator = random.Random(seed)
    lines = [json.dumps({"text": sentence(generator, words + number % 7)}) for number in range(rows)]
    path.write_text("".join(line + "\n" for line in lines))
    return path
