"""Make the documents that are made of code: families, faults, commands, recipes.

python scripts/make_docs.py            # writes them
python scripts/make_docs.py --check    # says whether they are as they should be
"""

from __future__ import annotations

import ast
import json
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.api_reference import reference_page  # noqa: E402
from scripts.rooms import picture  # noqa: E402
from tests.faults.rows import LATER, ROWS  # noqa: E402

import shortstack  # noqa: E402
from shortstack.cli.help import EVERYWHERE, grouped, help_text, option_name, shown_default  # noqa: E402
from shortstack.common.options import Option  # noqa: E402
from shortstack.inspection.families import ENOUGH, families  # noqa: E402
from shortstack.recipes.merge import shipped_recipes  # noqa: E402
from shortstack.recipes.resolve import resolve  # noqa: E402
from shortstack.registry import COMMANDS, public_commands  # noqa: E402


def documents() -> dict[Path, str]:
    """What each document should hold."""
    return {
        ROOT / "docs/families.md": families_page(),
        ROOT / "docs/faults.md": faults_page(),
        ROOT / "docs/images/rooms.svg": picture(),
        ROOT / "docs/reference/commands.md": commands_page(),
        ROOT / "docs/reference/python.md": reference_page(),
        ROOT / "docs/reference/recipes.md": recipes_page(),
        ROOT / "src/shortstack/__init__.pyi": type_stub(),
        **{path.with_suffix(".md"): notebook_page(path) for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb"))},
    }


def notebook_page(path: Path) -> str:
    """A notebook as a page: its text, and its cells of code."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]
    parts = [text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells]
    note = f"The [notebook]({path.name}) of this page runs in Jupyter; `scripts/make_docs.py` made the page of it."
    return "\n\n".join([parts[0], note, *parts[1:]]) + "\n"


def type_stub() -> str:
    """What type checkers are told of the package: every public name, where it is."""
    where = {name: (f"shortstack.{module}", name) for name, module in shortstack.RECORDS.items()}
    where |= {name: tuple(row.function.split(":")) for name, row in public_commands().items()}
    lines = ["# Made by scripts/make_docs.py of registry.py and __init__.py.", ""]
    for name, (module, own) in sorted(where.items(), key=lambda one: (one[1][0], one[0])):
        lines.append(f"from {module} import {own} as {name}")
    lines += ["", "RECORDS: dict[str, str]", "__version__: str", ""]
    return "\n".join(lines)


def commands_page() -> str:
    """Every command with its example and its options, as `shortstack help` shows them."""
    everywhere = ", ".join(f"`{name}` ({text[:1].lower()}{text[1:].rstrip('.')})" for name, text in EVERYWHERE.items())
    lines = [
        "# Commands",
        "",
        "Made by `scripts/make_docs.py` of the functions' signatures and docstrings, of which the command line is made, too.",
        f"Every command also has {everywhere}.",
        "Exit codes: 0 done, 1 an error, which is said in one or two lines, 2 wrong usage, 130 interrupted. Figures go to",
        "standard output, progress and logs to standard error.",
        "",
        "`shortstack help COMMAND` shows what is here. `shortstack completion --install` makes bash, zsh or fish complete",
        "commands, options and their choices; `shortstack completion bash` prints the script.",
    ]
    for name, row in COMMANDS.items():
        lines += ["", f"## {name}", "", row.summary, "", "```text", row.example, "```"]
        groups = grouped(row)
        lines += [] if groups else ["", "No options of its own."]
        for heading, options in groups:
            lines += ["", f"{heading}:", "", "| option | default | |", "|---|---|---|"]
            for option in options:
                default = "required" if option.is_required else shown_default(option)
                default = f"`{default}`" if default and not option.is_required else default
                lines.append(f"| {option_names(option)} | {default} | {cell(help_text(option, row.options))} |")
    return "\n".join([*lines, ""])


def option_names(option: Option) -> str:
    """`--name`, with `--no-name` where it decides both ways, or NAME for what is positional."""
    return ", ".join(f"`{part.partition(' ')[0]}`" for part in option_name(option).split(", "))


def cell(text: str) -> str:
    """A text in a cell of a table."""
    return " ".join(text.replace("|", "\\|").split())


def recipes_page() -> str:
    """Every recipe in the package, with a line each."""
    lines = [
        "# Recipes in the package",
        "",
        "Made by `scripts/make_docs.py`; `shortstack recipes` prints the same, `shortstack recipes NAME` all of one. How",
        "they are written and run: [Recipes](../guide/recipes.md).",
        "",
        "| recipe | begins with | |",
        "|---|---|---|",
    ]
    for name in shipped_recipes():
        recipe = resolve(name, to_run=False)
        model = f"`{recipe.model}`" if recipe.model else "any: `--model MODEL`"
        lines.append(f"| `{name}` | {model} | {cell(recipe.about)} |")
    return "\n".join([*lines, ""])


def families_page() -> str:
    """One row per family, as `shortstack families` shows it."""
    found = families()
    versions = ", ".join(f"{name} {version}" for name, version in found.measured_with.items())
    causal, other = found.counted("causal"), found.counted("other")
    lines = [
        "# Model families",
        "",
        "Made by `scripts/make_docs.py` of the table in `families/table.py` and of what the test matrix has measured",
        "(`scripts/prove_families.py`; `shortstack families` shows the same).",
        "",
        f"{causal} decoder-only causal language models are shortened exactly, with {ENOUGH} or more sets of blocks each;",
        f"{other} encoders and decoders of other models, run as causal ones, are too. Measured on tiny models",
        f"of six blocks with {versions}: logits of the pruned checkpoint equal those of the original with the blocks",
        "bypassed, bit for bit in float32; no key is missing or left over; cached generation equals uncached where it",
        "does in the dense model; and scores by `ppl`, `taylor` and `magnitude` equal naive removal and autograd.",
        "",
        "A family that is not here is probed: a tiny model of the same config is built and tried, for every set of blocks",
        "that is to go, and the set is refused unless the tiny model stays exact.",
        "",
        "| family | kind | shortened | sets exact | sets refused | scored | why not, or why so |",
        "|---|---|---|---|---|---|---|",
    ]
    for facts in found.families:
        cells = (
            f"`{facts.family}`", facts.kind, facts.status, facts.exact_sets or "-", facts.refused_sets or "-",
            facts.scored, facts.reason,
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)).rstrip() + " |")
    return "\n".join([*lines, ""])


def faults_page() -> str:
    """One row per fault, with the tests that cover it."""
    tests = marked_tests()
    lines = [
        "# Faults and bad input",
        "",
        "Made by `scripts/make_docs.py` of `tests/faults/rows.py` and of the `fault` markers of the tests.",
        "",
        "The contract: an output is absent, or complete and verified; the input is never changed; nothing is executed from",
        "a checkpoint; every refusal is one or two lines that name the place, what was found, what was expected and the",
        "next step.",
        "",
        "| # | what goes wrong | what happens | tests |",
        "|---|---|---|---|",
    ]
    for number, (fault, happens) in ROWS.items():
        shown = ", ".join(f"`{name}`" for name in tests[number])
        lines.append(f"| {number} | {fault} | {happens} | {shown} |")
    lines += ["", "Rows that come with stages that are not there yet:", ""]
    lines += [f"- {stage}: {', '.join(map(str, numbers))}" for stage, numbers in LATER.items()]
    return "\n".join([*lines, ""])


def marked_tests() -> dict[int, list[str]]:
    """Row -> `file::test` of every test with a `fault` marker, read off the source."""
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        everywhere = [row for node in tree.body if isinstance(node, ast.Assign) for row in _rows(node.value)]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                own = [row for decorator in node.decorator_list for row in _rows(decorator)]
                for row in sorted({*everywhere, *own}):
                    found[row].append(f"{path.relative_to(ROOT / 'tests')}::{node.name}")
    return found


def _rows(node: ast.AST) -> list[int]:
    """The numbers in `pytest.mark.fault(...)`, wherever it stands in an expression."""
    return [
        argument.value
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "fault"
        for argument in call.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, int)
    ]


def main() -> None:
    stale = [path for path, text in documents().items() if not path.is_file() or path.read_text() != text]
    if "--check" in sys.argv:
        sys.exit(f"not as they should be: {', '.join(map(str, stale))}; run scripts/make_docs.py" if stale else 0)
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
