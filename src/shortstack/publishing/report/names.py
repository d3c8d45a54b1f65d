"""Names that a page has for models, texts and figures: words, and no path of anybody's disk."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

from shortstack.artifacts.results import Result
from shortstack.common.formatting import plain
from shortstack.common.paths import is_path, public_name, without_paths
from shortstack.publishing.report.material import Material


@dataclass(frozen=True)
class NamedModel:
    """A model that was measured.

    Attributes:
        label: what the page calls it: dense, pruned, retrained, quantized where that says which, else its name.
        name: its folder's name, or its id.
        role: what it is, as far as records say; "" where none does.
        fingerprint, parameters, nbytes: of it.
    """

    label: str
    name: str
    role: str
    fingerprint: str
    parameters: int
    nbytes: int


def named(material: Material) -> tuple[list[NamedModel], list[Result]]:
    """(the models, the dense one first; the results under their labels)."""
    roles = {one.fingerprint: one.role for one in material.histories if one.fingerprint is not None}
    if material.dense_fingerprint is not None:
        roles[material.dense_fingerprint] = "dense"
    facts = {(one.model, one.fingerprint): one for one in material.results}
    # One checkpoint may have been named in several ways; it is one model.
    names = {fingerprint: shown(model) for model, fingerprint in reversed(facts)}
    of_role, of_name = Counter(roles.get(one, "") for one in names), Counter(names.values())
    found: dict[str, NamedModel] = {}
    for (_, fingerprint), result in facts.items():
        role, name = roles.get(fingerprint, ""), names[fingerprint]
        unique = name if of_name[name] == 1 else f"{name} ({fingerprint[:8]})"
        label = role if role and of_role[role] == 1 else unique
        found.setdefault(fingerprint, NamedModel(label, name, role, fingerprint, result.parameters, result.nbytes))
    models = sorted(found.values(), key=lambda one: one.role != "dense")
    return models, [_renamed(one, found[one.fingerprint].label) for one in material.results]


def _renamed(result: Result, label: str) -> Result:
    notes = [without_paths(note.replace(result.model, label)) for note in result.notes]
    data = result.data
    if isinstance(data.get("source"), str):
        data = {**data, "source": shown(data["source"])}
    return replace(result, model=label, data=data, notes=notes)


def shown(source: str) -> str:
    """What a page calls a model or a text: an id as it is, of a path its last part."""
    return plain(public_name(source) if is_path(source) else source)


def shared(text: str) -> str:
    """Text as it may be passed on: without paths, control characters and secrets."""
    return plain(str(without_paths(text)))


def figure_name(what: str, name: str) -> str:
    """A figure as words: `ppl_128_bos_every` is perplexity in windows of 128, each with BOS."""
    match = re.fullmatch(r"ppl_(\d+)(_bos_every)?", name) if what == "ppl" else None
    if match is None:
        return "mean accuracy" if name == "AVE" else name
    return f"perplexity, windows of {match[1]}" + (", BOS in each" if match[2] else "")
