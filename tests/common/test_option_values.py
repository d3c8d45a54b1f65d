"""What a Python caller may give for an option, and how the rest is refused."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch

import shortstack
from shortstack.common.option_values import Amount, Form, Listed, fitted
from shortstack.errors import UsageError
from shortstack.registry import COMMANDS, public_commands

Choice = Literal["auto", "float32", "bfloat16"]
Source = Annotated[Path, Form(also="pathlib:PurePosixPath")]


@pytest.mark.parametrize(
    ("annotation", "value", "found"),
    [
        (int, 3, 3),
        (int, np.int64(3), 3),
        (int | None, None, None),
        (int | Literal["auto"], "auto", "auto"),
        (float, 2, 2),
        (float, np.float32(0.5), 0.5),
        (bool, True, True),
        (str, "x", "x"),
        (str, Path("a/b"), "a/b"),
        (str, torch.device("cpu"), "cpu"),
        (Path, "a/b", Path("a/b")),
        (Path | None, Path("a"), Path("a")),
        (Choice, "float32", "float32"),
        (Choice | None, torch.bfloat16, "bfloat16"),
        (Listed | None, [10, 11], "10,11"),
        (Listed, (128,), "128"),
        (Listed, 128, "128"),
        (Listed, range(3, 6), "3,4,5"),
        (Listed, np.array([1, 2]), "1,2"),
        (Listed, ["ppl", "taylor:p=2,weight=sum"], "ppl,taylor:p=2,weight=sum"),
        (Listed, [Path("a.txt"), "b.txt"], "a.txt,b.txt"),
        (Amount, 1_000_000, "1000000"),
        (Amount, 5.5e9, "5500000000"),
        (Amount, "1B", "1B"),
        (Source, "a", Path("a")),
        (Sequence[str], ["a=b"], ("a=b",)),
        (Sequence[str], "a=b", ("a=b",)),
        (Any, object, object),
    ],
)
def test_what_fits(annotation: Any, value: Any, found: Any) -> None:
    fit = fitted("name", annotation, value)
    assert fit == found
    assert type(fit) is type(found)


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (int, "10", "a whole number"),
        (int, 1.5, "a whole number"),
        (int, True, "a whole number"),
        (int | None, "x", "a whole number or None"),
        (float, "0.5", "a number"),
        (float, False, "a number"),
        (bool, 1, "True or False"),
        (bool | None, "yes", "True, False or None"),
        (str, 5, "text"),
        (str, ["a"], "text"),
        (Listed, {"a": 1}, "text or a list"),
        (Listed, [], "text or a list"),
        (Listed, [1.5], "text or a list"),
        (Amount, True, "text or a number"),
        (Path, 5, "a path"),
        (Source, 5, "a path or PurePosixPath"),
        (Choice, "pub", "'auto', 'float32' or 'bfloat16'"),
        (Choice, 5, "'auto', 'float32' or 'bfloat16'"),
        (int | Literal["auto"], "x", "a whole number or 'auto'"),
        (Sequence[str], [1], "a list of texts"),
    ],
)
def test_what_does_not_fit(annotation: Any, value: Any, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        fitted("name", annotation, value)
    assert caught.value.message == f"name={value!r}: expected {expected}"


def test_the_nearest_choice_is_named_and_long_values_are_cut_short() -> None:
    with pytest.raises(UsageError, match="did you mean bfloat16"):
        fitted("dtype", Choice, "bflaot16")
    with pytest.raises(UsageError) as caught:
        fitted("samples", int, "x" * 1000)
    assert len(caught.value.message) < 120


NAMES = [(name, option) for name, row in public_commands().items() for option in row.options]


@pytest.mark.fault(109)
@pytest.mark.parametrize(("name", "option"), NAMES)
def test_no_option_of_any_command_takes_what_it_cannot_be(
    name: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its type, a value of a class of one's own is refused before anything runs."""
    monkeypatch.setattr("shortstack.registry.Command.need_packages", lambda _: None)
    function, row = getattr(shortstack, name), public_commands()[name]
    nothing = object()
    needed = [one for one in row.options.values() if one.default is inspect.Parameter.empty and not one.many]
    required = {one.name: "x" for one in needed}
    positional: list[object] = ["x" for one in needed if one.positional] if row.options[option].many else []
    keywords = {} if positional or row.options[option].many else {**required, option: nothing}
    with pytest.raises(UsageError, match=f"{option}=<object object at .*: expected "):
        function(*positional, *([] if keywords else [nothing]), **keywords)


@pytest.mark.fault(109)
def test_every_literal_is_checked() -> None:
    """`sampling="pub"` once ran."""
    for name, row in public_commands().items():
        for option in row.options.values():
            if "Literal" in str(option.annotation):
                assert COMMANDS[row.name] is row
                with pytest.raises(UsageError, match=f"{option.name}='pub': expected "):
                    row.stage(**{option.name: "pub"})
        assert name


@pytest.mark.parametrize("name", public_commands())
def test_a_path_may_be_a_text_wherever_there_is_one(name: str) -> None:
    """And what is a text on the command line (a model, a source of data) may be a path."""
    row = public_commands()[name]
    function = inspect.unwrap(row.stage)
    types = typing.get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        if dataclasses.is_dataclass(parameter.default):
            types |= typing.get_type_hints(type(parameter.default), include_extras=True)
    for option in row.options.values():
        if option.is_path or option.name in ("model", "models", "data", "dense", "base", "teacher", "tokenizer"):
            as_text, as_path = (fitted(option.name, types[option.name], kind("a/b")) for kind in (str, Path))
            assert as_text == as_path
            assert isinstance(as_path, Path if option.is_path else str)


def test_a_dry_run_and_a_device_in_python(tmp_path: Path) -> None:
    """The docs say "the same options": these two were not there once."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"say {n}", "output": "yes, that"} for n in range(12)]))
    estimate = shortstack.retrain_lora(
        "embedded", data=rows, out=tmp_path / "out", dry_run=True, batch=2, micro_batch=2, validation=2, quiet=True
    )
    assert not (tmp_path / "out").exists()
    assert str(estimate) == estimate.to_text()
    text = tmp_path / "text.txt"
    text.write_text("a text that is long enough for some windows. " * 60)
    results = shortstack.evaluate("embedded", data=[text], seq_len=64, device="cpu", quiet=True)
    assert results.results[0].settings["device"] == "cpu"
