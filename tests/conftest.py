from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Two test processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from tests.kills import Warm

SHARED = Path(__file__).resolve().parents[2] / "shared"
REAL = Path(__file__).resolve().parents[1] / "real/smollm2"
# A full collection looks at a million objects of libraries: an eighth of the time of some tests.
gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What evaluations keep lies in a folder of the tests' own. And what is imported is nothing that garbage collection
    has to look at again and again: each retraining run collects, over a million objects of libraries."""
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHORTSTACK_CACHE", str(tmp_path_factory.mktemp("kept")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _small_measurements() -> Iterator[None]:
    """What the machine reaches is measured with small products and short intervals: no test reads those figures, and each
    row of `bench` would take seconds. tests/benchmark/test_work.py measures in the sizes that a user's run does."""
    from shortstack.benchmark import floors, memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(floors, "_WIDEST", {**floors._WIDEST, "cpu": 256})
        patch.setattr(floors, "_ENOUGH_OPERATIONS", 1e8)
        patch.setattr(memory, "INTERVAL_SECONDS", 0.02)
        yield


# Files of tests that take minutes go first, so that none of them is left for one process alone at the end.
_LONGEST = (
    "test_kills",
    "test_quickstart",
    "test_processes",
    "test_coordination",
    "test_shipped",
    "test_matrix",
    "test_docs_commands",
    "test_golden",
    "test_zeroshot",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; within a file, and among the others, the order stays."""
    items.sort(key=lambda item: not item.path.stem.startswith(_LONGEST))


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "golden").is_dir():
        pytest.skip("../shared is not beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct, as `make real` leaves it."""
    if not (REAL / "config.json").is_file():
        pytest.skip("no real/smollm2 (make real)")
    return REAL


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Pico checkpoints by family and options, built once per test process. They must not be changed."""
    from tests import pico

    known: dict[str, Path] = {}

    def get(family: str = "llama", **options: object) -> Path:
        key = repr((family, sorted(options.items(), key=str)))
        if key not in known:
            known[key] = pico.build(tmp_path_factory.mktemp(family), family, **options)  # type: ignore[arg-type]
        return known[key]

    return get


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """A process that has everything imported, and is forked for a command that must be a process of its own."""
    with Warm("shortstack.retraining.trainer", "peft", "accelerate", "matplotlib.figure") as process:
        yield process


@pytest.fixture
def copied(built: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy that a test may break."""
    import shutil

    def get(family: str = "llama", **options: object) -> Path:
        return Path(shutil.copytree(built(family, **options), tmp_path / "model"))

    return get


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny checkpoints by name, built once per test process. They must not be changed."""
    from tests.families import tiny

    known: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in known:
            known[name] = tiny.build(tmp_path_factory.mktemp("tiny"), name)
        return known[name]

    return get
