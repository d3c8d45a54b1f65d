"""Every command in the guide and in the help is run; what is not says why."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from shortstack.registry import COMMANDS
from tests import pico
from tests.benchmark.material import measure_memory_here
from tests.commands import blocks, run_command, run_document
from tests.hub_server import serving
from tests.publishing.export import fake
from tests.recipes import material
from tests.retraining.material import instructions, texts
from tests.retraining.test_hub_datasets import parquet

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Pages of notebooks are run by tests/scripts/test_notebooks.py, cell by cell.
WITH_COMMANDS = [
    page
    for page in PAGES
    if page.parent.name != "notebooks" and any(block.kind in ("sh", "python") for block in blocks(page))
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what the texts speak of, and a server with the sets and the model that they name."""
    folder = tmp_path_factory.mktemp("docs")
    here = folder / "here"
    data = material.data(folder / "data")
    rows = [json.loads(line) for line in texts(folder / "t.jsonl", rows=40).read_text().splitlines()]
    sizes = {
        "num_hidden_layers": 14,
        "hidden_size": 32,
        "intermediate_size": 64,
        "head_dim": 16,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
    }
    pico.build(here / "MODEL", "llama", **sizes)
    for name in ("calibration.txt", "evaluation.txt"):
        (here / name).write_text("\n\n".join(row["text"] for row in (rows[::2] if name[0] == "c" else rows[1::2])))
    texts(here / "text.jsonl")
    instructions(here / "rows.json")
    shutil.copytree(data["tasks"], here / "tasks")
    for split in ("train", "test"):
        parquet(folder / f"wikitext/wikitext-2-raw-v1/{split}-0.parquet", rows)
    for split in ("train", "validation"):
        parquet(folder / f"ptb/penn_treebank/{split}/0000.parquet", [{"sentence": row["text"]} for row in rows])
    (folder / "c4/en").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for name in ("c4-train.00000-of-01024", "c4-validation.00000-of-00008"):
        (folder / f"c4/en/{name}.json.gz").write_bytes(gzip.compress(lines))
    (folder / "alpaca").mkdir()
    instructions(folder / "alpaca/alpaca_data_cleaned.json")
    (folder / "books/plain_text/train").mkdir(parents=True)
    shutil.copy(data["bookcorpus"] / "0000.parquet", folder / "books/plain_text/train")
    deep = pico.build(folder / "vicuna", "llama", **{**sizes, "num_hidden_layers": 32})
    repositories = {
        "lmsys/vicuna-7b-v1.3": deep, "datasets/Salesforce/wikitext": folder / "wikitext",
        "datasets/ptb-text-only/ptb_text_only": folder / "ptb", "datasets/allenai/c4": folder / "c4",
        "datasets/yahma/alpaca-cleaned": folder / "alpaca", "datasets/bookcorpus/bookcorpus": folder / "books",
    }  # fmt: skip
    from huggingface_hub import constants

    with serving(repositories) as (endpoint, _), pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        measure_memory_here(patch)
        # llama.cpp's converter is a program of its own: a small one stands for it.
        patch.setenv("PATH", str(fake.converter(folder / "bin").parent), prepend=os.pathsep)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        for name, value in (("HF_ENDPOINT", endpoint), ("HF_HUB_OFFLINE", "0"), ("HF_HOME", str(folder / "home"))):
            patch.setitem(os.environ, name, value)
        yield here


# The quickstart's own steps are in the long form: tests/recipes/test_quickstart.py runs them, as one recipe.
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] if page.name == "quickstart.md" else []) for page in WITH_COMMANDS],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_command_of_a_page(page: Path, hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran, left_out = run_document(page)
    marked = sum(block.reason is not None for block in blocks(page))
    assert ran + marked + len(left_out) > 0
    if left_out:
        pytest.skip(f"{ran} commands were run; packages are missing for: {'; '.join(left_out)}")


def test_every_example_of_the_help(hub: Path) -> None:
    """In the order of the table, each on what the ones before it left."""
    left_out: dict[str, str] = {}
    for verb, entry in COMMANDS.items():
        if verb not in ("quickstart", "demo"):  # run by tests/recipes/test_quickstart.py, tests/demo/test_app.py
            run_command(entry.example, f"example of {verb}", left_out)
    if left_out:
        pytest.skip(f"packages are missing for: {'; '.join(left_out.values())}")


def test_commands_that_are_not_run_are_few() -> None:
    """A mark is for what a test cannot run, not for what it would be a bother to."""
    marked = [(page.name, block.body) for page in PAGES for block in blocks(page) if block.reason is not None]
    assert len(marked) <= 18
    for _, body in marked:
        first = body.split()[0]
        whole = (
            "shortstack quickstart" in body
            or "run quickstart" in body
            or "run any-light" in body
            or "../shared" in body
        )
        served = "shortstack demo" in body  # until it is interrupted; tests/demo runs it
        engine = (
            "--engine" in body
        )  # programs of their own; tests/inspection/test_check_engines.py runs them where they are
        assert whole or served or engine or first in ("pip", "make", "torchrun", "vllm", "python"), body


def test_no_command_hides_in_an_indented_block() -> None:
    for page in PAGES:
        for number, line in enumerate(page.read_text().splitlines(), start=1):
            assert not line.startswith("    shortstack "), f"{page.name}, line {number}"
