"""A tokenizer in place of a checkpoint's own (`--tokenizer`): where its files lie, which they are, and their hash."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shortstack.checkpoint.config_file import Repair, repair_for, repaired
from shortstack.checkpoint.hub import locate
from shortstack.errors import ShortstackError

# One of these makes a directory one with a tokenizer.
NEEDED_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
_TOKENIZER_FILE = re.compile(
    r"(.*token.*|vocab.*|merges.*|tekken.*|spiece.*|chat_template.*)\.(json|txt|model|tiktoken|jinja)|.*\.(model|tiktoken|jinja)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ChosenTokenizer:
    """A tokenizer's files.

    Attributes:
        source: what the user called it.
        directory: where they lie; other files may lie there, too.
    """

    source: str
    directory: Path

    @cached_property
    def repair(self) -> Repair | None:
        """What is known to be wrong with its files, and right."""
        try:
            config = json.loads((self.directory / "config.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        return repair_for(config, self.directory) if isinstance(config, dict) else None

    @cached_property
    def files(self) -> dict[str, bytes]:
        """What is in each, without known faults, by name."""
        return {
            path.name: repaired(self.repair, path.name, path.read_bytes())
            for path in sorted(self.directory.iterdir())
            if path.is_file() and is_tokenizer_file(path.name)
        }

    @cached_property
    def sha256(self) -> str:
        """Over the names and bytes of all."""
        digest = hashlib.sha256()
        for name, data in self.files.items():
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
        return digest.hexdigest()

    def described(self) -> dict[str, str]:
        """What records say of it."""
        return {"source": self.source, "sha256": self.sha256}


def is_tokenizer_file(name: str) -> bool:
    """Whether a file beside the weights is a tokenizer's, by its name."""
    return _TOKENIZER_FILE.fullmatch(name) is not None


def chosen_tokenizer(source: str | None) -> ChosenTokenizer | None:
    """The tokenizer that a `--tokenizer` names; None where it names none.

    Raises:
        ShortstackError: there is no such directory or hub id, or no tokenizer in it.
    """
    if source is None:
        return None
    directory = locate(source, what="tokenizer")
    if not any((directory / name).is_file() for name in NEEDED_FILES):
        raise ShortstackError(
            f"--tokenizer {source}: no tokenizer in the directory (tokenizer.json or tokenizer.model)",
            hint="give a directory with a tokenizer, or a hub id",
        )
    return ChosenTokenizer(source, directory)
