"""What `embedded` means: the small model in the package, and the text that every CPython carries.

The text is the language reference in `pydoc_data.topics` and the docstrings of the standard library, read from the
running interpreter: nothing that others wrote is shipped. The held-out part is listed by name (`assets/heldout.json`, made by
`scripts/train_embedded.py`), so that evaluation uses other text than training and calibration.
"""

from __future__ import annotations

import ast
import functools
import json
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shortstack.common.assets import ASSETS
from shortstack.errors import ShortstackError

if TYPE_CHECKING:
    from shortstack.checkpoint.reader import Checkpoint
    from shortstack.common.progress import Progress

HELDOUT_NAMES = ASSETS / "heldout.json"

# Folders of the standard library whose docstrings are not reference text (tests, demos, vendored or installed code).
_SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "ensurepip"}
_SHORTEST_DOCUMENT = 60  # characters; shorter docstrings say nothing a language model could learn from


@dataclass(frozen=True)
class Document:
    """One text with the name it is known by, such as `topics:with` or `argparse:ArgumentParser.add_argument`."""

    name: str
    text: str


@functools.cache
def documents() -> tuple[Document, ...]:
    """All documents of the running interpreter, in name order, exact repetitions dropped."""
    from pydoc_data.topics import topics

    found = [Document(f"topics:{name}", text.strip()) for name, text in sorted(topics.items())]
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts) and relative.parts[0] != "pydoc_data":
            found.extend(_docstrings(path, ".".join(relative.with_suffix("").parts)))
    if len(found) < 1000:
        raise ShortstackError(
            f"the embedded text needs the standard library's source files; {root} has {len(found)} documents",
            hint="give a text of your own with --data FILE",
        )
    seen: set[str] = set()
    unique = []
    for document in found:
        if len(document.text) >= _SHORTEST_DOCUMENT and document.text not in seen:
            seen.add(document.text)
            unique.append(document)
    return tuple(sorted(unique, key=lambda document: document.name))


def heldout_documents() -> list[Document]:
    """The documents that the embedded model never saw: what its figures are computed on."""
    return [document for document in documents() if document.name in _heldout_names()]


def training_documents() -> list[Document]:
    """The documents that the embedded model was trained on: what calibration windows are drawn from."""
    return [document for document in documents() if document.name not in _heldout_names()]


def python_name() -> str:
    """The interpreter whose text was read, as figures name it: the text differs between Python versions."""
    return f"Python {platform.python_version()}"


@functools.cache
def _heldout_names() -> frozenset[str]:
    return frozenset(json.loads(HELDOUT_NAMES.read_text(encoding="utf-8"))["names"])


def _docstrings(path: Path, module: str) -> list[Document]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []  # deliberately broken files (bad encodings) are part of some distributions
    found: list[Document] = []
    pending: list[tuple[ast.AST, str]] = [(tree, "")]
    while pending:
        node, name = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                found.append(Document(f"{module}:{name}", text.strip()))
        for child in ast.iter_child_nodes(node):
            inner = getattr(child, "name", "") if isinstance(child, ast.ClassDef | ast.FunctionDef) else ""
            pending.append((child, f"{name}.{inner}".strip(".") if inner else name))
    return found


def say_of_own_text(checkpoint: Checkpoint, data: str, harm: str, progress: Progress) -> None:
    """Say so where nobody chose the text that weights are fitted on.

    Args:
        checkpoint: the model.
        data: the text's source.
        harm: what this text can do to a model that was made for other text.
        progress: where it is said.
    """
    if data == "embedded" and (checkpoint.provenance or {}).get("source", checkpoint.source) != "embedded":
        progress.say(
            f"the text is the package's own (documentation of Python), so {harm}: give text like that of your task with "
            "--data TEXT"
        )
