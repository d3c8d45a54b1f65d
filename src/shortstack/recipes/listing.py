"""What recipes there are, what one comes to, and what one may say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shortstack.common.formatting import wrapped
from shortstack.common.json_text import json_text
from shortstack.common.options import stage
from shortstack.common.shown import Shown
from shortstack.errors import ShortstackError
from shortstack.recipes.merge import shipped_recipes
from shortstack.recipes.resolve import resolve


@dataclass(frozen=True, repr=False)
class RecipeList(Shown):
    """The recipes in the package.

    Attributes:
        recipes: name -> what it does.
    """

    recipes: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {"schema": 1, "recipes": self.recipes}

    def to_text(self) -> str:
        """A line each."""
        return "\n".join(
            [
                wrapped(self.recipes.items()),
                "",
                "shortstack run NAME --dry-run shows what one would do; shortstack recipes NAME shows all of it",
            ]
        )


@dataclass(frozen=True, repr=False)
class RecipeText(Shown):
    """One recipe, or the schema, as text.

    Attributes:
        text: YAML, or JSON for the schema.
        record: the same as data.
    """

    text: str
    record: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return self.record

    def to_text(self) -> str:
        """The text."""
        return self.text


@stage
def recipes(what: str | None = None) -> RecipeList | RecipeText:
    """List the recipes in the package; show one in full, or the JSON schema for editors.

    Args:
        what: Show this recipe, by name or file, with everything that it extends; or `schema`, the JSON schema. By
            default the recipes are listed.

    Returns:
        What was requested.

    Raises:
        ShortstackError: there is no such recipe, or it is wrong.
    """
    if what is None:
        return RecipeList({name: resolve(name, to_run=False).about for name in shipped_recipes()})
    if what == "schema":
        from shortstack.recipes.schema import json_schema

        schema = json_schema()
        return RecipeText(json_text(schema, indent=1), schema)
    import yaml

    text = resolve(what, to_run=False).to_yaml()
    record = yaml.safe_load(text)
    if not isinstance(record, dict):
        raise ShortstackError(f"{what}: is not a recipe")
    return RecipeText(text.rstrip(), record)
