"""YAML -> plain data with the line of every key: no object that a tag names is constructed, nothing grows, nothing is lost.

Scalars are those of YAML 1.2: `1e-4` is a number, `no` is text, only `true` and `false` are truth values. A key that is
duplicate, a tag, an alias that makes the text grow, and a file above 1 MB are refused.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.errors import ShortstackError, system_reason

LARGEST = 1_000_000  # bytes of a recipe
_MOST_NODES = 10_000  # after aliases are followed
_LONGEST_NUMBER = 40  # characters
_TAG = "tag:yaml.org,2002:"
# Tag -> pattern of the scalars that have it, and the characters that they begin with; the first that fits counts.
_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
     "-+.0123456789"),
)  # fmt: skip

_YAML_TAB = "YAML is indented by spaces: replace the tab"
_YAML_QUOTES = "text that holds `: ` or ` #`, or begins with one of [ ] { } & * ! | > % @, needs quotes"

Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Loaded:
    """What a YAML text holds.

    Attributes:
        data: mappings, lists, text, numbers, truth values and None.
        lines: the line of each key and list entry, by its way down from the top.
    """

    data: Any
    lines: dict[Place, int]


def load_yaml(path: Path) -> Loaded:
    """Read a YAML file.

    Raises:
        ShortstackError: no such file, too large, not YAML, or more than plain data; names the line.
    """
    try:
        if path.is_dir():
            raise ShortstackError(f"{path}: is a directory, expected a recipe (YAML)")
        with path.open("rb") as stream:
            raw = stream.read(LARGEST + 1)
    except OSError as error:
        raise ShortstackError(
            f"{path}: cannot be read ({system_reason(error)})", hint="shortstack recipes lists those in the package"
        ) from None
    if len(raw) > LARGEST:
        raise ShortstackError(f"{path}: larger than {LARGEST // 1_000_000} MB, which no recipe is")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ShortstackError(f"{path}: not UTF-8 at byte {error.start}", hint="convert the file to UTF-8") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Loaded:
    """Parse a YAML text, which errors call `source`.

    Raises:
        ShortstackError: not YAML, or more than plain data; names the line.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {}  # noqa: RUF012 (as the base has it)

    for name, pattern, first in _SCALARS:
        Loader.add_implicit_resolver(_TAG + name, re.compile(f"^(?:{pattern})$"), list(first))
    try:
        node = yaml.compose(text, Loader=Loader)
        if node is None:
            return Loaded(None, {})
        _check_growth(node, source)
        lines: dict[Place, int] = {}
        return Loaded(_plain(node, (), lines, source), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise ShortstackError(
            f"{source}{where}: not valid YAML: {error.problem or error.context}",
            hint=_YAML_TAB if "\\t" in str(error.problem) else _YAML_QUOTES,
        ) from None
    except (yaml.YAMLError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise ShortstackError(f"{source}: not valid YAML: {reason}", hint="check the file in an editor") from None


def _children(node: Any) -> Iterator[Any]:
    for part in node.value if isinstance(node.value, list) else ():
        yield from part if isinstance(part, tuple) else (part,)


def _check_growth(top: Any, source: str) -> None:
    """Refuse aliases that lead back to themselves, and those with which a small text becomes a large recipe."""
    sizes: dict[int, int] = {}  # nodes below each, itself included, with aliases followed
    open_nodes: set[int] = set()

    def size(node: Any) -> int:
        if id(node) in open_nodes:
            raise ShortstackError(f"{source}, line {node.start_mark.line + 1}: an alias (*name) inside its own anchor")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            sizes[id(node)] = 1 + sum(size(child) for child in _children(node))
            open_nodes.discard(id(node))
        return sizes[id(node)]

    if size(top) > _MOST_NODES:
        raise ShortstackError(
            f"{source}: {size(top):.3g} entries once its aliases (*name) are followed, expected at most {_MOST_NODES}",
            hint="use `extends` for what recipes have in common",
        )


def _plain(node: Any, place: Place, lines: dict[Place, int], source: str) -> Any:
    kind = node.tag.removeprefix(_TAG)
    if kind == "map":
        return _plain_mapping(node, place, lines, source)
    if kind == "seq":
        for number, part in enumerate(node.value):
            lines[(*place, number)] = part.start_mark.line + 1
        return [_plain(part, (*place, number), lines, source) for number, part in enumerate(node.value)]
    if kind == "str":
        return str(node.value)
    if kind == "null":
        return None
    if kind == "bool":
        return node.value.lower() == "true"
    if kind in ("int", "float") and len(node.value) <= _LONGEST_NUMBER:
        with contextlib.suppress(ValueError):
            return int(node.value) if kind == "int" else float(re.sub(r"\.(?=inf|nan)", "", node.value.lower()))
    raise ShortstackError(
        f"{source}, line {node.start_mark.line + 1}: {_shown(node)} is not allowed in a recipe",
        hint="a recipe holds text, numbers, true and false, lists and mappings, without tags",
    )


def _plain_mapping(node: Any, place: Place, lines: dict[Place, int], source: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag != _TAG + "str":
            raise ShortstackError(
                f"{source}, line {line}: a key must be text, found {_shown(key_node)}", hint="put the key in quotes"
            )
        key = str(key_node.value)
        if key in found:
            first = lines[(*place, key)]
            raise ShortstackError(
                f"{source}, line {line}: duplicate key {key} (first in line {first})", hint="keep one of them"
            )
        lines[(*place, key)] = line
        found[key] = _plain(value_node, (*place, key), lines, source)
    return found


def _shown(node: Any) -> str:
    value = node.value if isinstance(node.value, str) else "..."
    tag = node.tag.replace(_TAG, "!!")
    return f"{tag} {value}"[:60]
