"""Documents that are made of code are as the code is; every fault has a test, or says with which stage it comes."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from tests.faults.rows import LATER, ROWS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return load_maker()


def load_maker() -> ModuleType:
    """scripts/make_docs.py, which makes the documents that are made of code."""
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts/make_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_documents_are_current(maker: ModuleType) -> None:
    for path, text in maker.documents().items():
        assert path.read_text() == text, f"run: python scripts/make_docs.py ({path.name})"


def test_every_fault_has_a_test(maker: ModuleType) -> None:
    covered = {row for row, tests in maker.marked_tests().items() if tests}
    assert sorted(set(ROWS) - covered) == []
    assert sorted(covered - set(ROWS)) == []
    later = {row for rows in LATER.values() for row in rows}
    assert set(range(1, 95)) <= {*ROWS, *later}


def test_links_between_documents_lead_somewhere() -> None:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_paths_in_documents_exist() -> None:
    """A file that has moved is named where it is now; what was measured and tried stays as it was written."""
    pages = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
    missing = []
    for path in pages:
        if path.name in ("experiments.md", "measurements.md", "results.md", "CHANGELOG.md"):
            continue
        for named in re.findall(r"`((?:[\w.-]+/)+[\w-]+\.py)`", path.read_text()):
            if not any(
                (root / named).exists() for root in (ROOT, ROOT / "src/shortstack", ROOT / "tests", ROOT / "docs")
            ):
                missing.append(f"{path.name}: {named}")
    assert missing == []


def test_the_number_of_families_in_the_readme_is_what_was_measured() -> None:
    from shortstack.inspection.families import families

    number = families().counted("causal")
    for name in ("README.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text()
        assert f"{number} decoder-only architectures" in text, name


def test_every_published_script_has_its_recipe() -> None:
    from tests.recipes.test_published_values import PIPELINES

    page = (ROOT / "docs/guide/published-scripts.md").read_text()
    rows = re.findall(r"\| `prune_(\S+)_crit-(\w+?)(?:_yesBOS)?\.sh` \| \S+ \| (\d+) \| `([^`]+)` \|", page)
    assert len(rows) == 20
    for _, criterion, removed, recipe in rows:
        assert PIPELINES[recipe][1:] == (criterion, int(removed))


def test_every_page_is_in_the_guide() -> None:
    import yaml

    def pages(part: object) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [page for one in (part.values() if isinstance(part, dict) else part) for page in pages(one)]  # type: ignore[union-attr]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))


def test_one_way_to_install() -> None:
    """A clone, then extras by the name that errors give: `pip install shortstack` alone may find somebody else's package."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    blocks = {
        path.name: block
        for path in pages
        for block in re.findall(r"```sh\n((?:pip install .*\n)+)```", path.read_text())
    }
    assert set(blocks) == {"README.md", "index.md", "quickstart.md"}
    assert len(set(blocks.values())) == 1
    for path in pages:
        for what in re.findall(r"pip install (?:-\S+ \S+ )*('?(?:shortstack|\.)[^\s`)]*)", path.read_text()):
            assert re.fullmatch(r"\.|'shortstack\[[a-z,]+\]'", what), f"{path.name}: pip install {what}"


_IMPORTED_AS = {"lm-eval": "lm_eval", "pytest-xdist": "", "pytest-socket": "", "types-PyYAML": "", "mypy": "", "ruff": "",
                "mkdocs-material": "material"}  # fmt: skip


def test_every_extra_is_used_and_named() -> None:
    """What an extra installs is imported; an error names the extra, or a target of the Makefile installs it."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    tests = "\n".join(path.read_text() for folder in ("tests", "scripts") for path in (ROOT / folder).rglob("*.py"))
    for extra, packages in extras.items():
        if extra in ("dev", "docs"):
            assert f"'.[{extra}]'" in makefile
        elif extra == "all":
            assert set(re.findall(r"\w+", packages[0])) - {"shortstack"} == set(extras) - {"all", "dev", "docs"}
            assert "`all`" in readme
        else:
            assert f'extra="{extra}"' in source or f"shortstack[{extra}]" in source, extra
            assert re.search(rf"`{extra}`|\[[a-z,]*\b{extra}\b", readme), extra
        for package in packages if extra != "all" else ():
            name = re.split(r"[><=\[]", package)[0]
            module = _IMPORTED_AS.get(name, name)
            everywhere = source + (tests + makefile if extra in ("dev", "docs") else "")
            assert not module or re.search(rf"\b{module}\b", everywhere), f"{extra}: nothing imports {name}"


# The options of the published scripts, by the heading of their table.
SHARED = "base_model tokenizer model_type ckpt lora_ckpt device seed use_bfloat fix_decapoda_config output_dir"
PUBLISHED_OPTIONS = {
    "What all scripts share": SHARED,
    "Scores:": "seed max_seq_len num_calib_data output_dir add_bos_to_every batch_size norm_power weight_reduction "
    "block_reduction",
    "Pruning:": "num_pruned_blocks block_order_csv skip_validation no_plus_heuristic",
    "Retraining:": "save_lora_merge data_path extra_val_dataset batch_size micro_batch_size num_epochs learning_rate "
    "cutoff_len val_set_size prompt_template_name no_instruction lora_r lora_alpha lora_dropout lora_target_modules "
    "train_on_inputs add_eos_token group_by_length wandb_project resume_from_checkpoint",
    "Perplexity and samples:": "input_prompt num_output seed top_p top_k temperature max_seq_len",
    "Zero-shot:": "model model_args tasks provide_description num_fewshot batch_size max_batch_size output_json limit "
    "data_sampling no_cache decontamination_ngrams_path description_dict_path check_integrity write_out output_base_path",
    "Quantisation:": "quantized_model_dir tokenizer",
    "Time, memory": "input_prompt batch_size num_all_runs num_warmup_runs seed top_p top_k temperature max_seq_len "
    "output_dir",
}


@pytest.mark.parametrize("heading", PUBLISHED_OPTIONS)
def test_each_option_of_a_published_script_has_its_row(heading: str) -> None:
    page = (ROOT / "docs/guide/published-scripts.md").read_text()
    (section,) = [part for part in page.split("\n## ") if part.startswith(heading)]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    named = {option for row in rows for option in re.findall(r"--(\w+)", row[0])}
    assert sorted(set(PUBLISHED_OPTIONS[heading].split()) - named) == []


def test_what_stands_for_a_published_option_exists() -> None:
    """On the right of each table: commands and options of shortstack."""
    from shortstack.registry import COMMANDS

    known = {name.replace("_", "-") for command in COMMANDS.values() for name in command.options} | {"set", "ckpt"}
    for line in (ROOT / "docs/guide/published-scripts.md").read_text().splitlines():
        here = line.strip("| ").split(" | ")[-1]
        for option in re.findall(r"--([a-z][a-z0-9-]*)", here):
            assert {option, option.removeprefix("no-")} & known, f"{line[:80]}: no --{option}"
