"""Every file that shortstack writes is JSON to every reader, and no number is lost in it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shortstack
from shortstack.common.json_text import NOT_FINITE, json_text, read_json

SOURCE = Path(shortstack.__file__).parent
# Where Python's own form stays: json_text itself, and config.json, which transformers reads and may hold Infinity.
# Programs that benchmarks and quantization drive are spoken to in lines that they alone read.
OWN_FORM = {
    "common/json_text.py", "checkpoint/config_file.py", "benchmark/memory.py", "benchmark/engines/llama_cpp.py",
    "benchmark/engines/program.py", "benchmark/engines/foreign/worker.py", "quantization/worker.py",
}  # fmt: skip


def strict(text: str) -> Any:
    """As other readers take it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.fault(111)
def test_infinity_and_nan_have_a_form_of_their_own() -> None:
    record = {"a/b": {"ppl": math.inf, "~": [1.0, -math.inf]}, "n": math.nan, "fine": 1.5}
    written = strict(json_text(record))
    assert written["a/b"] == {"ppl": None, "~": [1.0, None]}
    assert written[NOT_FINITE] == {"/a~1b/ppl": "Infinity", "/a~1b/~0/1": "-Infinity", "/n": "NaN"}
    back = read_json(json_text(record))
    assert back["a/b"] == record["a/b"]
    assert math.isnan(back.pop("n"))
    assert back == {"a/b": record["a/b"], "fine": 1.5}


def test_each_of_a_list_of_objects_tells_of_its_own() -> None:
    records = [{"v": 1.0}, {"v": math.inf}]
    assert strict(json_text(records)) == [{"v": 1.0}, {"v": None, NOT_FINITE: {"/v": "Infinity"}}]
    assert read_json(json_text(records)) == records


def test_finite_records_are_written_as_ever() -> None:
    record = {"b": [1, 2.5, None], "a": "é"}
    assert json_text(record, indent=1, sort_keys=True) == json.dumps(record, indent=1, sort_keys=True)


@pytest.mark.parametrize("note", [{"/b": "Infinity"}, {"/a/0": "Infinity"}, {"/a": "Infinity"}, {"/c": "much"}])
def test_a_damaged_note_is_refused(note: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"not_finite names|could not convert"):
        read_json(json.dumps({"a": 1, "c": None, NOT_FINITE: note}))


_KEYS = st.text() | st.just(NOT_FINITE) | st.sampled_from(["", "/", "/a", "~"])
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(_KEYS, inner),
    max_leaves=12,
)


@given(st.dictionaries(_KEYS, _VALUES) | st.lists(st.dictionaries(_KEYS, _VALUES)))
def test_whatever_is_written_is_read_back(record: Any) -> None:
    strict(json_text(record))
    assert read_json(json_text(record)) == record


@pytest.mark.parametrize(
    "own", [3, None, {}, {"/a": "Infinity"}, {"": 1}, {"/a": math.inf}, {"": math.inf}, [math.inf]]
)
@pytest.mark.parametrize("a", [1.0, math.inf])
def test_a_key_not_finite_of_a_records_own_is_kept(own: Any, a: float) -> None:
    for record in ({NOT_FINITE: own, "a": a}, [{"a": a}, {NOT_FINITE: own, "a": a}], {"in": {NOT_FINITE: own}, "a": a}):
        strict(json_text(record))
        assert read_json(json_text(record)) == record


@pytest.mark.parametrize("own", [3, {"count": 3}, ["/a"], {}])
def test_a_key_not_finite_that_another_program_wrote_is_left_alone(own: Any) -> None:
    assert read_json(json.dumps({"a": None, NOT_FINITE: own})) == {"a": None, NOT_FINITE: own}


def test_nothing_writes_json_by_another_way() -> None:
    others = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if re.search(r"\bjson\.dumps?\(", path.read_text(encoding="utf-8"))
    }
    assert others == OWN_FORM
