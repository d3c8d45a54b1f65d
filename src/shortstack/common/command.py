"""What a row of the registry holds: one command, from its name to what a recipe's step leaves behind."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from shortstack.common.extras import missing_packages, need_packages
from shortstack.common.keywords import errors_in_python
from shortstack.common.options import Option, call_with, options_of, records_of

# What a step of a recipe leaves behind for later ones.
Kind = Literal["checkpoint", "adapter", "scores", "plan", "teacher logits", "results", "report", "GGUF file", "text"]


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: as on the command line.
        function: module:name of the stage function.
        summary: the first sentence of the function's docstring, which a test compares.
        example: a command that shows it, which a test runs.
        api: its name in Python, as `shortstack.NAME`: by default the function's own; "-" where it has none. No room's name.
        step: a recipe can have it as a step.
        makes: what a step leaves behind for later ones, and where in the step's folder; the first is OUT ("" where OUT is
            the folder itself). Empty where the function writes nothing, and the run writes what it returned.
        unless: what is not made where an option has this value.
        parallel: processes that were started together work on it together.
        needs: import names of packages beyond the core.
        extra: the extra that installs them.
        check: module:name of a function that looks, before anything runs, at what the options name: values by option name
            (a model as a `Forecast`) -> lines about what could not be looked at; it raises what is wrong.
        runs_with: options of which one makes it run the model; without them it reads and writes files alone, and the data
            type and device of a whole recipe are not for it. Empty where it always runs the model, or never.
        estimate: module:name of a function that foresees what a step leaves behind and computes: values -> `Estimate`.
    """

    name: str
    function: str
    summary: str
    example: str
    api: str = ""
    step: bool = True
    makes: Mapping[Kind, str] = field(default_factory=dict)
    unless: Mapping[Kind, tuple[str, Any]] = field(default_factory=dict)
    parallel: bool = False
    needs: tuple[str, ...] = ()
    extra: str = ""
    check: str = ""
    estimate: str = ""
    runs_with: tuple[str, ...] = ()

    @property
    def identifier(self) -> str:
        """Its name as an identifier."""
        return self.name.replace(" ", "_").replace("-", "_")

    @property
    def public_name(self) -> str:
        """Its name in Python; "" where it has none."""
        return "" if self.api == "-" else self.api or self.function.partition(":")[2]

    @functools.cached_property
    def stage(self) -> Callable[..., Any]:
        """The stage function, which is imported now."""
        return _imported(self.function)

    @property
    def options(self) -> dict[str, Option]:
        """Everything that the function takes, by name."""
        return options_of(self.stage)

    @property
    def public(self) -> Callable[..., Any]:
        """The function as `shortstack.NAME`: errors name keywords, missing packages are one line instead of a traceback."""
        stage = self.stage

        @functools.wraps(stage)
        def called(*positional: Any, **given: Any) -> Any:
            self.need_packages()
            with errors_in_python(self.options, given):
                return stage(*positional, **given)

        return called

    def call(self, values: Mapping[str, Any]) -> Any:
        """Call the function with values by option name.

        Raises:
            UsageError: a package that it needs is not installed.
        """
        self.need_packages()
        return call_with(self.stage, values)

    def check_options(self, values: Mapping[str, Any]) -> None:
        """Refuse values that contradict one another or are out of range, before anything runs.

        Raises:
            UsageError: they are.
        """
        records_of(self.stage, values)

    def makes_with(self, values: Mapping[str, Any]) -> dict[Kind, str]:
        """What a step with these values leaves behind, and where."""
        return {
            kind: place
            for kind, place in self.makes.items()
            if kind not in self.unless or values.get(self.unless[kind][0]) != self.unless[kind][1]
        }

    def look_ahead(self, kind: Literal["check", "estimate"]) -> Callable[[Mapping[str, Any]], Any] | None:
        """The function that checks or estimates, where there is one."""
        where = self.check if kind == "check" else self.estimate
        return _imported(where) if where else None

    @property
    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        return missing_packages(self.needs)

    @property
    def install(self) -> str:
        """What to give to pip where one is missing."""
        return f"'shortstack[{self.extra}]'" if self.extra else " ".join(self.needs)

    def need_packages(self) -> None:
        """Say now, rather than after the work, that a package is missing.

        Raises:
            UsageError: one is not installed; with the command that installs it.
        """
        need_packages(self.name, *self.needs, extra=self.extra)


def _imported(where: str) -> Callable[..., Any]:
    module, _, name = where.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function
