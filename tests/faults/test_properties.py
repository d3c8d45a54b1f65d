"""Random headers, indexes, configs, plans and CSV files: never a traceback, never an output that does not load.

2,000 examples here, 100,000 with `make soak` (SHORTSTACK_EXAMPLES).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from shortstack.artifacts.scores import CriterionScores, Scores
from shortstack.evaluation.ppl import parse_lengths
from shortstack.pruning.budget import parse_amount
from shortstack.pruning.plan import parse_blocks, plan
from shortstack.scoring.criteria import parse_criteria
from tests.faults import examples

Built = Callable[..., Path]
EXAMPLES = int(os.environ.get("SHORTSTACK_EXAMPLES", "2000"))
PATHS = st.lists(st.integers(0, 9), min_size=1, max_size=5)


def share(of_hundred: int) -> Any:
    """Settings for this share of all examples."""
    return settings(
        max_examples=max(1, EXAMPLES * of_hundred // 100),
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@pytest.fixture(scope="module")
def scores_text(built: Built) -> str:
    from shortstack.families.open_model import open_checkpoint

    criterion = CriterionScores("ppl", (3.0, 1.0, 2.0, 5.0, 4.0, 6.0), tuple(range(6)))
    fingerprint = open_checkpoint(built("llama")).fingerprint
    return json.dumps(Scores("x", fingerprint, tuple(range(6)), {"ppl": criterion}).to_json())


@pytest.mark.fault(1, 2, 3, 4, 5, 6, 7, 8, 9)
@share(20)
@given(examples.headers())
def test_any_header(tmp_path: Path, data: bytes) -> None:
    examples.check_header(tmp_path, data)


@pytest.mark.fault(19, 20, 21, 22, 23, 24, 32)
@share(20)
@given(examples.config_edits(), examples.BLOCKS)
def test_any_config(built: Built, edits: dict[str, Any], blocks: str) -> None:
    examples.check_config(built("llama"), edits, blocks)


@pytest.mark.fault(10, 11, 13, 14, 15, 16)
@share(10)
@given(
    st.dictionaries(
        st.sampled_from(
            ["lm_head.weight", "model.norm.weight", "model.layers.2.mlp.up_proj.weight", "metadata", "new"]
        ),
        st.sampled_from(["model-00001-of-00007.safetensors", "../x", "/etc/passwd", ".", "", 3, None])
        | examples.SCALARS,
        max_size=2,
    ),
    examples.BLOCKS,
)
def test_any_index(built: Built, edits: dict[str, Any], blocks: str) -> None:
    examples.check_index(built("llama", shard_bytes=40_000), edits, blocks)


@pytest.mark.fault(46, 47)
@share(15)
@given(PATHS, examples.JSON)
def test_any_plan(built: Built, path: list[int], value: Any) -> None:
    record = plan(str(built("llama")), blocks="1,3").to_json()
    text = json.dumps(examples.edited(record, path, value))
    examples.check_record(built("llama"), "plan.json", text, "plan")


@pytest.mark.fault(46, 47)
@share(15)
@given(st.text(alphabet='0123456789,-\n. ="x\ufeff', max_size=24) | st.text(max_size=12), st.integers(-1, 8))
def test_any_block_order(built: Built, text: str, remove: int) -> None:
    examples.check_record(built("llama"), "order.csv", text, "scores", remove=remove, plus=False)


@pytest.mark.fault(46)
@share(10)
@given(PATHS, examples.JSON, st.integers(0, 6))
def test_any_scores(built: Built, scores_text: str, path: list[int], value: Any, remove: int) -> None:
    text = json.dumps(examples.edited(json.loads(scores_text), path, value))
    examples.check_record(built("llama"), "scores.json", text, "scores", remove=remove, plus=False)


@share(10)
@given(st.text(alphabet="0123456789,-.:= \x1f²٣kKMBTpmtaylorsumweightbatch", max_size=24) | st.text(max_size=400))
def test_any_option(text: str) -> None:
    for parse in (parse_blocks, parse_amount, parse_criteria, parse_lengths):
        code, said = examples.quietly(lambda parse=parse: parse(text))
        assert code in (0, 2)
        assert len(said.splitlines()) <= 2
