"""The model card of a checkpoint: README.md in the hub's form, made from the record of how the checkpoint was made.

Nothing in it names a place on somebody's disk, and nothing that is named in it can become markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint.hub import parse_hub_id
from shortstack.common.formatting import count, ranges
from shortstack.common.json_fields import nested
from shortstack.common.paths import public_name, without_paths

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CARD = "README.md"
PLACEHOLDER = "ORG/NAME"  # where the card speaks of the checkpoint's own id; `push` puts it in
# What the new card takes from the card of the model that the checkpoint was made from.
_CARRIED = ("language", "license", "license_name", "license_link")
_FRONT_LIMIT = 100_000  # bytes
_FRONT = re.compile(r"---\r?\n(.*?\n)---\s*?(?:\r?\n|\Z)", re.DOTALL)
_LICENCE_FILE = re.compile(r"(licen[cs]e|notice|copying).*", re.IGNORECASE)
# Stage of a step -> what people find such models by.
_TAGS = {
    "prune": ("pruned", "depth-pruning"), "prune-width": ("pruned", "width-pruning"), "quantize": ("quantized",),
}  # fmt: skip


@dataclass(frozen=True)
class CardFigures:
    """What was measured on a checkpoint, as its card shows it.

    Attributes:
        tables: in Markdown, each with its heading.
        eval_results: the same for the hub's metadata (`model-index`).
    """

    tables: Sequence[str] = ()
    eval_results: Sequence[EvalResult] = ()


_NONE = CardFigures()


def front_matter(path: Path) -> dict[str, Any]:
    """The metadata of a card; empty where there is no card, or none that can be read."""
    import yaml

    if not path.is_file():
        return {}
    with path.open("rb") as stream:
        match = _FRONT.match(stream.read(_FRONT_LIMIT).decode("utf-8", "replace"))
    try:
        found = yaml.safe_load(match[1]) if match else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def carried_over(path: Path) -> dict[str, Any]:
    """Licence and languages, as the card at `path` states them."""
    found = front_matter(path)
    return {key: found[key] for key in _CARRIED if _is_text(found.get(key))}


def base_model_of(record: Mapping[str, Any]) -> str:
    """The hub id of the model that a checkpoint was made from; empty where it is unknown.

    Args:
        record: shortstack.json.
    """
    base = record.get("base_model")
    if base is None and record.get("revision"):  # as earlier versions wrote it: only what came from the hub has one
        base = record.get("source")
    found = parse_hub_id(base) if isinstance(base, str) else None
    return found[0] if found and "/" in found[0] else ""


def model_card(record: Mapping[str, Any], carried: Mapping[str, Any], figures: CardFigures = _NONE) -> str:
    """README.md of a checkpoint: metadata for the hub, then what it is, how it was made, how to use it, figures, licence.

    Args:
        record: shortstack.json.
        carried: metadata that is the same for the new checkpoint and the one that it was made from.
        figures: what was measured on it.
    """
    from huggingface_hub.repocard_data import ModelCardData

    base, steps = base_model_of(record), record["steps"]
    stages = [str(step.get("stage")) for step in steps]
    title = _title(record, stages)
    data = ModelCardData(
        base_model=base or None,
        # The hub has no word of its own for a pruned model; this is what it takes any derived one for.
        base_model_relation=("quantized" if "quantize" in stages else "finetune") if base else None,
        datasets=_datasets(steps) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["shortstack", *_tags(steps)],
        model_name=title if figures.eval_results else None,
        eval_results=list(figures.eval_results) or None,
        **carried,
    )
    parts = [
        f"# {title}",
        _what_it_is(record, stages),
        f"## How it was made\n\nThe steps, with shortstack {nested(steps[-1], 'versions', 'shortstack') or ''}:",
        "\n".join(f"{number}. {_described(step)}" for number, step in enumerate(steps, start=1)),
        _blocks(record) + "\n- `shortstack.json` holds the full record",
        "## Use",
        _use(stages),
        "## Figures",
        *(figures.tables or ["No figures were measured on this checkpoint."]),
        "Evaluate it on your own task: figures on one text say little about another.",
        f"## Licence\n\n{_licence(carried, base, record)}",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def plain_markdown(text: str) -> str:
    """Text without what Markdown, HTML or a table would take as markup."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f|`<>\[\]*\\]", "_", text)


def _title(record: Mapping[str, Any], stages: Sequence[str]) -> str:
    removed, depth = _removed(record), record["original_depth"]
    shorter = f" without {len(removed)} of its {depth} Transformer blocks" if removed else ""
    narrower = ", narrowed" * ("prune-width" in stages)
    repaired = ", repaired" * ("repair" in stages)
    trained = ", retrained" * bool({"retrain", "merge"} & set(stages))
    return f"{_name(record['source'])}{shorter}{narrower}{repaired}{trained}{', quantized' * ('quantize' in stages)}"


def _what_it_is(record: Mapping[str, Any], stages: Sequence[str]) -> str:
    base, removed = base_model_of(record), _removed(record)
    name = f"[{base}](https://huggingface.co/{base})" if base else _name(record["source"])
    lines = [f"{name} with {len(removed)} of its {record['original_depth']} Transformer blocks removed"]
    if not removed:
        lines = [f"Made from {name}"]
    sizes = [
        size for step in record["steps"] for key in ("before", "after") if (size := nested(step, key, "parameters"))
    ]
    if sizes and sizes[-1] != sizes[0]:
        fewer = 1 - sizes[-1] / sizes[0]
        lines[0] += f": {count(sizes[-1])} parameters instead of {count(sizes[0])} ({fewer:.1%} fewer)"
    lines[0] += "."
    if set(stages) == {"prune"}:
        lines.append(
            "Every kept tensor has the bytes of the original. The checkpoint was not trained after the removal: expect worse "
            "text than from the original until it is retrained."
        )
    elif set(stages) == {"prune", "repair"}:
        changed = sum(len(nested(step, "tensors") or ()) for step in record["steps"] if step.get("stage") == "repair")
        lines.append(
            f"{changed} tensors were repaired in closed form; all others have the bytes of the original. The checkpoint was "
            "not trained: expect worse text than from the original until it is retrained."
        )
    elif set(stages) <= {"prune", "prune-width"}:
        lines.append(
            "Heads and channels were removed from every block; the kept weights are unchanged. The checkpoint was not "
            "trained after the removal: expect worse text than from the original until it is retrained."
        )
    return "\n".join(lines)


def _described(step: Mapping[str, Any]) -> str:
    """One line about one step."""
    stage = step.get("stage")
    if stage == "prune":
        calibration = nested(step, "why", "scores", "calibration", "source") or "none"
        before, after = nested(step, "before", "parameters"), nested(step, "after", "parameters")
        return (
            f"pruned from {before} to {after} parameters; chosen by: {_name(step.get('criterion'))}, "
            f"calibration text: {_name(calibration)}"
        )
    if stage == "prune-width":
        before, after = (nested(step, side, "parameters") for side in ("before", "after"))
        heads, channels = (nested(step, "after", what) for what in ("heads", "channels"))
        calibration = _name(nested(step, "why", "scores", "calibration", "source"))
        return (
            f"made narrower, from {before} to {after} parameters: {heads} heads and {channels} channels in every block; "
            f"chosen by: {_name(step.get('criterion'))}, calibration text: {calibration}"
        )
    if stage == "repair":
        return _repair(step)
    if stage == "retrain":
        data = _name(nested(step, "data", "source"))
        return f"retrained ({_name(step.get('method'))}) for {step.get('steps')} steps, {step.get('tokens')} tokens of {data}"
    if stage == "quantize":
        calibration = step.get("calibration")
        text = (
            f", calibrated on {nested(calibration, 'samples')} windows of {nested(calibration, 'seq_len')} tokens of "
            f"{_name(nested(calibration, 'source'))}"
        )
        return f"quantized to {_name(step.get('scheme'))} ({_name(step.get('method'))}){text if calibration else ''}"
    return "merged: an adapter was folded into the weights" if stage == "merge" else _name(stage)


def _repair(step: Mapping[str, Any]) -> str:
    before, after = (nested(step, "ppl", which) for which in ("pruned", "repaired"))
    text = f"repaired in closed form ({_name(step.get('method'))})"
    if not isinstance(before, float) or not isinstance(after, float):
        return text
    source = _name(nested(step, "calibration", "source"))
    return f"{text}: perplexity {before:.4g} before and {after:.4g} after, on windows of {source} that chose the repair"


def _blocks(record: Mapping[str, Any]) -> str:
    removed = ranges(_removed(record)) or "none"
    kept = ranges(record["kept_blocks"])
    return f"- blocks removed (numbered as in the original model): {removed}\n- blocks kept: {kept}"


def _use(stages: Sequence[str]) -> str:
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{PLACEHOLDER}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{PLACEHOLDER}")',
        'ids = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))",
        "```",
        "",
        f"`{PLACEHOLDER}` is the id on the hub; the path of a directory with these files works, too. vLLM serves it under "
        f"the same name: `vllm serve {PLACEHOLDER}`.",
    ]
    if "quantize" in stages:
        lines.append("To load the quantized weights, transformers needs the package `compressed-tensors`.")
    return "\n".join(lines)


def _licence(carried: Mapping[str, Any], base: str, record: Mapping[str, Any]) -> str:
    files = [f"`{plain_markdown(name)}`" for name in record.get("files", {}) if _LICENCE_FILE.fullmatch(name)]
    stated = " ".join(_name(carried[key]) for key in ("license", "license_name") if key in carried)
    of = f"the base model, {base}" if base else "the model that it was made from"
    text = f"The licence of {of}: {stated}." if stated else f"The licence of {of}."
    return f"{text} Its text is in {', '.join(files)}." if files else text


def _tags(steps: Iterable[Mapping[str, Any]]) -> list[str]:
    tags = [tag for step in steps for tag in _TAGS.get(str(step.get("stage")), ())]
    schemes = [
        str(step.get(key)).lower() for step in steps for key in ("scheme", "method") if step.get("stage") == "quantize"
    ]
    return list(dict.fromkeys([*tags, *(tag for tag in schemes if re.fullmatch(r"[a-z0-9._-]+", tag))]))


def _datasets(steps: Iterable[Mapping[str, Any]]) -> list[str]:
    """Hub ids of published sets that were trained on, as far as their names say it."""
    from shortstack.data.hub_datasets import NAMED_SETS

    sources = [nested(step, "data", "source") for step in steps if step.get("stage") == "retrain"]
    return list(dict.fromkeys(NAMED_SETS[source].repository for source in sources if source in NAMED_SETS))


def _removed(record: Mapping[str, Any]) -> list[int]:
    return sorted(set(range(record["original_depth"])) - set(record["kept_blocks"]))


def _name(value: Any) -> str:
    """What a record calls something, as a card may show it."""
    return plain_markdown(public_name(without_paths(str(value))))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(one, str) for one in value) and bool(value)
    )
