"""A run is three values: each is made once, and none of them grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.retraining import cpt
from shortstack.retraining import run as runs
from shortstack.retraining.local_run import block_by_block
from shortstack.retraining.whole_run import whole_model


@pytest.mark.parametrize("way", ["cpt", "local"])
def test_prepared_trained_and_result_are_made_once(
    way: str, retrained: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What training, writing and measuring see is the same objects, in frozen records without a field more."""
    seen: list[tuple[str, Any, dict[str, Any]]] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            seen.extend(
                (f"{name} {number}", one, dict(vars(one))) for number, one in enumerate(given[:2]) if records(one)
            )
            return function(*given)

        return call

    def records(one: Any) -> bool:
        return isinstance(one, (runs.Request, runs.Trained))

    def watching(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*given: Any, **named: Any) -> Any:
            found = make(*given, **named)
            names = ("train", "write", "measure")
            return dataclasses.replace(found, **{name: watched(name, getattr(found, name)) for name in names})

        return made

    monkeypatch.setattr(cpt, "whole_model", watching(whole_model))
    monkeypatch.setattr("shortstack.retraining.local_run.block_by_block", watching(block_by_block))
    retrained(way, tmp_path / "out")
    assert {name for name, _, _ in seen} == {"train 0", "write 0", "write 1", "measure 0", "measure 1"}
    assert len({id(one) for _, one, _ in seen}) == 2  # prepared, and trained
    for name, one, before in seen:
        assert type(one).__dataclass_params__.frozen, name
        assert vars(one).keys() == {field.name for field in dataclasses.fields(one)}, name
        assert all(vars(one)[key] is value for key, value in before.items()), name
        assert type(vars(one).get("schedule", one)).__dataclass_params__.frozen
