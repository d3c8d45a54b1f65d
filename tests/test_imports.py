"""Imports of packages that mypy skips: the modules and names exist. Of all others mypy knows it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import tomllib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_INSTALLED = {"compressed_tensors", "llmcompressor", "loguru"}  # of the extra `quantize`, which a worker imports


def skipped() -> set[str]:
    """Packages whose modules mypy does not follow."""
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    return {name.removesuffix(".*") for one in overrides for name in one["module"]}


def imported() -> dict[str, set[str]]:
    """Module of such a package -> the names that the source imports from it, wherever it does so."""
    packages, found = skipped(), defaultdict[str, set[str]](set)
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found[alias.name] |= set()
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                found[node.module] |= {alias.name for alias in node.names}
    return {module: names for module, names in found.items() if module.partition(".")[0] in packages}


def missing(imports: dict[str, set[str]]) -> list[str]:
    """Modules and names that are not there. A lazy package lists its names before it imports them."""
    found = []
    for module, names in sorted(imports.items()):
        if module.partition(".")[0] in NOT_INSTALLED:
            continue
        try:
            there = set(dir(importlib.import_module(module)))
        except ImportError:
            found.append(module)
            continue
        found += [f"{module}.{name}" for name in sorted(names - there) if not _is_module(f"{module}.{name}")]
    return found


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def test_what_the_source_imports_exists() -> None:
    imports = imported()
    assert {module.partition(".")[0] for module in imports} == skipped(), "a package is no longer imported"
    assert missing(imports) == []


def test_a_module_or_a_name_that_does_not_exist_is_found() -> None:
    assert missing({"transformers.no_such_module": set(), "tqdm": {"tqdm", "no_such_name"}}) == [
        "tqdm.no_such_name", "transformers.no_such_module",
    ]  # fmt: skip


def test_what_is_not_installed_is_not_installed() -> None:
    """What mypy may not find is what a development environment lacks."""
    assert {name for name in skipped() if importlib.util.find_spec(name) is None} <= NOT_INSTALLED
