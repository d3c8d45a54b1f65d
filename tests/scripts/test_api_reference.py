"""The Python reference: every public name with its parameters, what it returns and raises, and its method's source."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import shortstack
from scripts import api_reference
from shortstack.registry import public_commands

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/reference/python.md").read_text()
SECTIONS = {part.splitlines()[0]: part for part in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]}
STAGES = [name for name in public_commands() if name != "evaluate"]
# What computes or trains as a paper has it -> the paper.
METHODS = {
    "score": "2402.02834", "prune_width": "2305.11627", "retrain_lora": "2106.09685", "retrain_cpt": "2402.02834",
    "retrain_distill": "1503.02531", "retrain_local": "2411.19146",
    "teach": "1503.02531", "quantize": "2210.17323", "bench": "2211.17192",
}  # fmt: skip


@pytest.mark.parametrize("name", shortstack.__all__)
def test_every_public_name_is_there(name: str) -> None:
    if name == "evaluate":
        assert "`shortstack.evaluate` is the same function" in SECTIONS["evaluate_ppl"]
    else:
        assert name in SECTIONS, f"run: python scripts/make_docs.py ({name})"


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_everything_that_it_takes_returns_and_raises(name: str) -> None:
    section = SECTIONS[name]
    for parameter in inspect.signature(getattr(shortstack, name)).parameters.values():
        row = re.search(rf"^\| `\*?{parameter.name}` \| (.+?) \|.*\| (.+) \|$", section, re.MULTILINE)
        assert row, f"{name}({parameter.name})"
        assert len(row[2].split()) >= 2, f"{name}({parameter.name}) is not explained"
    assert "**Returns** " in section
    assert name in ("doctor",) or "| `ShortstackError` |" in section or "| `UsageError` |" in section
    assert re.search(r"Defined in `src/shortstack/[\w/]+\.py`\.", section)
    if name in METHODS:
        assert f"arXiv {METHODS[name]}" in section


def records() -> list[type]:
    named = [getattr(shortstack, name) for name in shortstack.RECORDS]
    returned = [kind for name in STAGES for kind in api_reference.returned(public_commands()[name].stage)]
    parts = [kind for one in returned for kind in api_reference.with_parts(one)]
    found = [one for one in (*named, *parts) if isinstance(one, type) and dataclasses.is_dataclass(one)]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("record", records(), ids=lambda record: record.__name__)
def test_every_field_of_a_record_is_explained(record: type) -> None:
    section = SECTIONS[record.__name__]
    for field in dataclasses.fields(record):
        if not field.name.startswith("_"):
            row = re.search(rf"^\| `{field.name}` \| (.+?) \|.*\| (.+) \|$", section, re.MULTILINE)
            assert row, f"{record.__name__}.{field.name}"
            assert row[2].strip(), f"{record.__name__}.{field.name} is not explained: a line under Attributes"


def test_what_a_stage_returns_is_described_with_the_records_in_it() -> None:
    for name in STAGES:
        for kind in api_reference.returned(public_commands()[name].stage):
            assert kind.__name__ in SECTIONS
    assert {"Agreement", "CurvePoint", "Difference", "Finding", "Foreseen", "Ranked", "StepResult"} <= set(SECTIONS)


def test_a_new_name_without_a_description_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that is added to the package is on the page that is made, whether or not somebody thought of it."""
    assert "\n### TensorInfo\n" not in api_reference.reference_page()
    monkeypatch.setitem(shortstack.RECORDS, "TensorInfo", "checkpoint.headers")
    assert "\n### TensorInfo\n" in api_reference.reference_page()


def test_tables_have_as_many_cells_in_every_row() -> None:
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(counts) == 1, table[:300]
