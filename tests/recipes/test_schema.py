"""One definition feeds function, command line and recipe."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import pytest
import yaml

from shortstack.cli.app import run
from shortstack.errors import ShortstackError
from shortstack.recipes.merge import SHIPPED, shipped_recipes
from shortstack.recipes.schema import (
    NOT_IN_RECIPES,
    OUTPUTS,
    REFERENCES,
    SOURCES,
    STEP,
    checked,
    json_schema,
    stages,
    step_model,
    step_options,
)
from shortstack.registry import COMMANDS

# Verbs that no step can be: they are about recipes, or about no checkpoint at all.
NOT_STAGES = {"quickstart", "families", "run", "recipes", "push", "demo", "doctor"}


def test_every_verb_is_a_stage_or_says_why_not() -> None:
    assert set(COMMANDS) - set(stages()) == NOT_STAGES


@pytest.mark.parametrize("verb", stages())
def test_parameters_are_those_of_the_function(verb: str) -> None:
    command = COMMANDS[verb]
    expected = set(inspect.signature(command.stage).parameters)
    assert set(command.options) == expected
    assert set(step_options(command)) == expected - NOT_IN_RECIPES
    assert all(option.help for option in command.options.values())
    assert not set(step_options(command)) & set(STEP)


def test_the_tables_name_parameters_that_exist() -> None:
    known = {name for command in stages().values() for name in command.options}
    assert known >= NOT_IN_RECIPES | OUTPUTS | SOURCES | set(REFERENCES)


@pytest.mark.parametrize("verb", stages())
def test_every_default_is_a_value_that_a_recipe_may_say(verb: str) -> None:
    """A type that pydantic reads otherwise than Python would show here."""
    defaults = {
        name: str(one.default) if one.is_path and one.default is not None else one.default
        for name, one in step_options(COMMANDS[verb]).items()
        if one.default is not inspect.Parameter.empty
    }
    found = checked(verb, defaults, lambda name: name)
    assert found == {name: value for name, value in defaults.items() if value is not None}


def test_the_schema_command_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == json.loads(json.dumps(json_schema()))
    rank = schema["$defs"]["retrain-lora"]["properties"]["rank"]
    assert rank["description"] == "The rank of the adapter."
    assert rank["default"] == 8
    assert {"type": "integer"} in rank["anyOf"]


def validates(schema: dict[str, Any], value: Any, top: dict[str, Any]) -> bool:
    """A validator of the part of JSON Schema that ours uses."""
    if "$ref" in schema:
        target: Any = top
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return validates(target, value, top)
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "integer": int,
        "number": (int, float),
    }
    if "type" in schema:
        names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        fits = any(
            isinstance(value, kinds[name]) and not (name in ("integer", "number") and isinstance(value, bool))
            for name in names
        )
        if not fits:
            return False
    checks = [
        "const" not in schema or value == schema["const"],
        "enum" not in schema or value in schema["enum"],
        "anyOf" not in schema or any(validates(part, value, top) for part in schema["anyOf"]),
        "allOf" not in schema or all(validates(part, value, top) for part in schema["allOf"]),
        "required" not in schema or all(key in value for key in schema["required"]),
    ]
    if isinstance(value, dict):
        known = schema.get("properties", {})
        further = schema.get("additionalProperties", True)
        for key, part in value.items():
            part_schema = known.get(key, further)
            checks.append(part_schema if isinstance(part_schema, bool) else validates(part_schema, part, top))
    if isinstance(value, list) and "items" in schema:
        checks += [validates(schema["items"], part, top) for part in value]
    return all(checks)


def test_editors_accept_every_shipped_file_and_see_what_is_wrong() -> None:
    schema = json_schema()
    for path in [*SHIPPED.glob("*.yaml"), *SHIPPED.glob("bases/*.yaml")]:
        # PyYAML reads 1e-4 as text, editors as a number.
        text = path.read_text().replace("1e-4", "0.0001").replace("3e-4", "0.0003")
        assert validates(schema, yaml.safe_load(text), schema), path.name
    for wrong in (
        {"modle": "x"},
        {"steps": {"score": {"sampels": 3}}},
        {"steps": {"score": {"samples": "many"}}},
        {"steps": {"x": {"stage": "scroe"}}},
        {"steps": {"x": {"stage": "score", "trust_remote_code": True}}},
    ):
        assert not validates(schema, wrong, schema), wrong


def test_the_list_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes"]) == 0
    shown = capsys.readouterr().out
    for name in shipped_recipes():
        assert f"\n{name} " in f"\n{shown}"
    assert run(["recipes", "gemma-2b-ppl"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["steps"]["score"]["bos_every"] is True
    assert run(["recipes", "gemma-2bb-ppl"]) == 1
    assert "did you mean gemma-2b-ppl?" in capsys.readouterr().err


def test_lists_become_positional_and_numbers_text() -> None:
    assert checked("eval ppl", {"models": "a", "seq_len": 128}, lambda name: name) == {
        "models": ["a"],
        "seq_len": "128",
    }
    with pytest.raises(ShortstackError, match="models is 3, expected text or a list of texts"):
        checked("eval ppl", {"models": 3}, lambda name: name)


def test_the_model_of_a_stage_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And anew for another function of the same name."""
    assert step_model("score") is step_model("score")
    other = dataclasses.replace(COMMANDS["plan"], name="score")
    before = step_model("score")
    monkeypatch.setitem(COMMANDS, "score", other)
    assert step_model("score") is not before
    assert set(step_model("score").model_fields) == set(step_options(COMMANDS["plan"]))
