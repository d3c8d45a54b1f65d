"""config.json and the files beside it that transformers reads: as transformers writes them, and known faults of theirs.

Some checkpoints are known to be published with a wrong config: found by a named rule, repaired in the copy, reported. The
input is never touched: what shortstack writes, and what it computes with, has the right values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# JSON files of a checkpoint -> entries to set in them; None removes one.
Edits = dict[str, dict[str, Any]]


def config_text(config: dict[str, Any]) -> str:
    """A config as text. Infinity stays as it is: transformers writes and reads it, and some families' limits are infinite."""
    return json.dumps(config, indent=2, ensure_ascii=False, allow_nan=True) + "\n"


@dataclass(frozen=True)
class Repair:
    """One known fault.

    Attributes:
        name: what users and records call it.
        says: the line that is printed.
        applies: whether a checkpoint has the fault, by its config and directory.
        edits: what is right.
    """

    name: str
    says: str
    applies: Callable[[Mapping[str, Any], Path], bool]
    edits: Edits


def _decapoda(config: Mapping[str, Any], directory: Path) -> bool:
    """The first conversion of LLaMA-1: BOS 0 and EOS 1 of a vocabulary where 0 is <unk>, 1 is <s> and 2 is </s>."""
    if config.get("vocab_size") != 32000 or (config.get("bos_token_id"), config.get("eos_token_id")) != (0, 1):
        return False
    tokenizer = _read(directory / "tokenizer_config.json")
    return tokenizer.get("tokenizer_class") == "LLaMATokenizer" or tokenizer.get("bos_token") == ""


REPAIRS = (
    Repair(
        "decapoda-token-ids",
        "known fault decapoda-token-ids: pad, BOS and EOS are set to 0, 1 and 2 in config, generation config and tokenizer",
        _decapoda,
        {
            "config.json": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
            "generation_config.json": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
            "tokenizer_config.json": {
                "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "pad_token": "<unk>", "bos_token": "<s>",
                "eos_token": "</s>", "add_bos_token": True, "add_eos_token": False,
            },
            "special_tokens_map.json": {
                "unk_token": "<unk>", "pad_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>",
            },
        },
    ),
)  # fmt: skip


def repair_for(config: Mapping[str, Any], directory: Path) -> Repair | None:
    """The repair that a checkpoint needs, or None."""
    return next((repair for repair in REPAIRS if repair.applies(config, directory)), None)


def repaired(repair: Repair | None, name: str, data: bytes) -> bytes:
    """The bytes of one of the checkpoint's files with the repair applied; unchanged where it says nothing of it."""
    if repair is None or name not in repair.edits:
        return data
    return config_text({**json.loads(data), **repair.edits[name]}).encode()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with another stored type, in whichever entries say it."""
    edited = {key: with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    return edited | {key: dtype for key in ("dtype", "torch_dtype") if key in config}
