"""No command writes over what it reads: outputs are compared with every other value that names something on the disk."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shortstack.common.source_names import before_and_place
from shortstack.errors import ShortstackError

_OUTPUTS = ("out", "csv", "plot", "png")  # options that name what a command writes
_CHECKPOINT = ("config.json", "adapter_config.json")  # one of them is in every folder that holds a model


def refuse_own_inputs(values: Mapping[str, Any]) -> None:
    """Refuse an output that is one of the command's inputs, or lies inside a checkpoint that it reads.

    Args:
        values: what a stage is called with, by name: texts, paths, lists of them, and records that hold such.

    Raises:
        ShortstackError: an output would change an input.
    """
    given = dict(_flat(values))
    outputs = {name: given.pop(name) for name in _OUTPUTS if given.get(name)}
    inputs = [Path(text) for value in given.values() for text in _texts(value) if _is_there(text)]
    for name, output in outputs.items():
        target = Path(os.path.abspath(Path(output).expanduser()))
        refuse_inputs(target, inputs, option=f"--{name}")


def refuse_inputs(target: Path, inputs: list[Path], option: str = "--out") -> None:
    """Refuse a target that is one of the inputs, or lies inside one that is a checkpoint; links are followed.

    Raises:
        ShortstackError: it is, or does.
    """
    real = os.path.realpath(target)
    for source in inputs:
        real_source = os.path.realpath(source)
        holds = any(os.path.isfile(os.path.join(real_source, name)) for name in _CHECKPOINT)
        inside = holds and real.startswith(os.path.join(real_source, ""))
        if inside or (real == real_source and not os.path.isdir(real)):
            where = f"lies inside the input {source}" if inside else "is the input"
            raise ShortstackError(f"{target}: {where}, which is never touched", hint=f"choose another {option}")


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Values by name, with the fields of records in their place."""
    for name, value in values.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        else:
            yield name, value


def _texts(value: Any) -> Iterator[str]:
    """What a value may name on the disk: itself, and where it is a list with commas, its parts."""
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if isinstance(text, str) and text:
            yield text
            yield from (part for part in text.split(",") if part and part != text)
            places = (before_and_place(part.strip()) for part in text.split(","))
            yield from (place for before, place in places if before and place)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def _is_there(text: str) -> bool:
    try:
        return os.path.exists(os.path.expanduser(text))
    except ValueError:  # no name of a file at all
        return False
