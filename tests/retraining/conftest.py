from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.pruning.prune import prune
from tests.retraining import material

LONG = {"max_position_embeddings": 512}


@pytest.fixture(scope="session")
def dense(built: Callable[..., Path]) -> Path:
    return built("llama", **LONG)


@pytest.fixture(scope="session")
def pruned(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "p"
    prune(str(dense), blocks="2,3", out=out, quiet=True)
    return out


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return material.instructions(tmp_path_factory.mktemp("data") / "rows.json")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return material.texts(tmp_path_factory.mktemp("data") / "text.jsonl")


@pytest.fixture(scope="session")
def teacher_cache(dense: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from shortstack.retraining.teach import teach

    out = tmp_path_factory.mktemp("cache") / "taught"
    teach(str(dense), data=str(text), out=out, top_k=16, seq_len=32, validation=4, quiet=True)
    return out


@pytest.fixture(scope="session")
def retrained(pruned: Path, rows: Path, text: Path, teacher_cache: Path, dense: Path) -> Callable[..., Any]:
    """Run one of the ways of retraining on the pico model, small and quick, with other options where they are given."""
    from shortstack.retraining.cpt import retrain_cpt
    from shortstack.retraining.distill import retrain_distill
    from shortstack.retraining.local import retrain_local
    from shortstack.retraining.lora import retrain_lora
    from shortstack.retraining.options import TrainingOptions

    def run(way: str, out: Path, model: Path | None = None, **changed: Any) -> Any:
        fields = TrainingOptions.__dataclass_fields__
        options = {"max_steps": 8, "save_every": 2, "log_every": 1, "eval_every": 2, "quiet": True}
        if way == "local":  # two blocks of four steps
            options = {"save_every": 2, "log_every": 1, "quiet": True}
        options |= {name: changed.pop(name) for name in list(changed) if name in fields}
        chosen: dict[str, Any] = {"lr": 1e-2, "batch": 4, "micro_batch": 2, "options": TrainingOptions(**options)}
        start = str(model or pruned)
        if way == "lora":
            return retrain_lora(start, out=out, **{**chosen, "data": str(rows), "cutoff": 400, **changed})
        if way == "offline":
            return retrain_distill(start, out=out, **{**chosen, "offline": teacher_cache, **changed})
        chosen["seq_len"] = 32
        if way == "cpt":
            return retrain_cpt(start, out=out, **{**chosen, "data": str(text), **changed})
        if way == "local":
            given = {"data": str(text), "of": str(dense), "radius": 1, "tokens": "512"}
            return retrain_local(start, out=out, **{**chosen, **given, **changed})
        given = {"data": str(text), "teacher": str(dense), "hidden_weight": 0.1}
        return retrain_distill(start, out=out, **{**chosen, **given, **changed})

    return run
