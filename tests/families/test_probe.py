"""Families that the table does not know: accepted only where a pruned copy equals the original with blocks bypassed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.data.calibration import CalibrationSet
from shortstack.errors import ShortstackError
from shortstack.families import table as anatomy
from shortstack.families.open_model import open_model
from shortstack.pruning.plan import plan_for
from shortstack.pruning.prune import prune
from shortstack.scoring.criteria import parse_criteria
from shortstack.scoring.score import score_windows
from tests.families import tiny

Tiny = Callable[[str], Path]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Take a family out of the table."""
    return lambda name: monkeypatch.delitem(anatomy.FAMILIES, name.partition("@")[0])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral", "bloom", "smollm3"])
def test_an_exact_family_is_found_to_be_exact(
    tiny_model: Tiny, forget: Callable[[str], None], name: str, tmp_path: Path
) -> None:
    model = tiny_model(name)
    known = tiny.open_checkpoint(model)
    forget(name)
    result = prune(str(model), out=tmp_path / "p", blocks="0,3", verify=True, quiet=True)
    assert result.verified is not None
    pruned, keys = tiny.load(tmp_path / "p")
    assert not keys["missing_keys"]
    dense, _ = tiny.load(model)
    with torch.no_grad(), tiny.passed_over(dense, known, [0, 3]):
        expected = dense(input_ids=tiny.WINDOWS, use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(pruned(input_ids=tiny.WINDOWS, use_cache=False).logits, expected)


# family -> a set that the table refuses, or knows a rule for that the probe cannot know: it must not be cut wrongly
UNSAFE = {
    "gpt2@scaled": "1",
    "diffllama": "1",
    "deepseek_v3": "0",
    "qwen3_moe": "0",
    "modernbert-decoder": "0",
    "zaya": "0",
}


@pytest.mark.parametrize("name", sorted(UNSAFE))
def test_what_is_not_exact_is_refused(tiny_model: Tiny, forget: Callable[[str], None], name: str) -> None:
    forget(name)
    checkpoint = open_model(str(tiny_model(name)))
    with pytest.raises(ShortstackError, match="tested on a tiny model"):
        plan_for(checkpoint, blocks=UNSAFE[name])
    plan_for(checkpoint, blocks="5")


@pytest.mark.parametrize("name", ["minicpm3", "xlstm", "rwkv"])
def test_families_where_no_block_can_go(tiny_model: Tiny, forget: Callable[[str], None], name: str) -> None:
    forget(name)
    with pytest.raises(ShortstackError, match="probing it did not help"):
        open_model(str(tiny_model(name)))


def test_state_between_blocks_is_noticed(tiny_model: Tiny, forget: Callable[[str], None]) -> None:
    """Run one block at a time it would be silently wrong: the probe compares, and the whole model is held."""
    forget("zaya")
    checkpoint = open_model(str(tiny_model("zaya")))
    assert "do not give what the model gives" in checkpoint.anatomy.family.resident


def test_scores_of_a_probed_family(tiny_model: Tiny, forget: Callable[[str], None]) -> None:
    def scored(checkpoint: Any) -> Any:
        windows = CalibrationSet(tiny.WINDOWS.tolist(), {})
        return score_windows(checkpoint, windows, parse_criteria("ppl,taylor,magnitude")).criteria

    known = scored(tiny.open_checkpoint(tiny_model("gpt2")))
    forget("gpt2")
    probed = scored(open_model(str(tiny_model("gpt2"))))
    assert {name: found.scores for name, found in probed.items()} == {n: f.scores for n, f in known.items()}


@pytest.mark.fault(34)
@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "never_heard_of", "num_hidden_layers": 6}, "no tiny model of it can be built"),
        ({"model_type": "t5", "num_layers": 6, "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "llava", "text_config": {"model_type": "x"}, "num_hidden_layers": 6}, "holds several models"),
        ({"model_type": "vit", "num_hidden_layers": 6}, "no tiny model of it can be built"),
        ({"model_type": "never_heard_of"}, "does not say how many blocks"),
    ],
)
def test_other_architectures_are_refused(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ShortstackError, match=says):
        open_model(str(tmp_path))
