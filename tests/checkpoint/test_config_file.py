"""Known wrong configs are repaired by a named rule, in what is written and in what is computed; the input stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.cli.app import run
from shortstack.data.tokenizer import load_tokenizer
from shortstack.families.open_model import open_checkpoint
from shortstack.inspection.check import check

Built = Callable[..., Path]


def decapoda(model: Path) -> Path:
    """The ids and the tokenizer config that the first conversion of LLaMA-1 was published with."""
    edits: dict[str, dict[str, Any]] = {
        "config.json": {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1},
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
        "tokenizer_config.json": {
            "bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer",
        },
    }  # fmt: skip
    for name, entries in edits.items():
        path = model / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    (model / "special_tokens_map.json").write_text("{}")
    return model


@pytest.fixture
def model(copied: Built) -> Path:
    return decapoda(copied("llama", vocab_size=32000, hidden_size=8, head_dim=4, num_attention_heads=2))


def test_ids_are_right_in_every_file_that_is_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    assert run(["prune", str(model), "--blocks", "1", "--out", str(tmp_path / "p"), "--verify"]) == 0
    assert "known fault decapoda-token-ids" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "p" / name).read_text())
        assert [found[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")] == [0, 1, 2], name
    tokenizer = json.loads((tmp_path / "p/tokenizer_config.json").read_text())
    assert (tokenizer["bos_token"], tokenizer["eos_token"]) == ("<s>", "</s>")
    record = json.loads((tmp_path / "p/shortstack.json").read_text())
    assert record["steps"][0]["repairs"] == ["decapoda-token-ids"]
    assert open_checkpoint(tmp_path / "p").repair is None


def test_calibration_has_the_right_bos(model: Path) -> None:
    tokenizer = load_tokenizer(open_checkpoint(model))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_check_names_it(model: Path) -> None:
    found = check(str(model), quiet=True)
    assert [finding.status for finding in found.findings if finding.what == "known faults"] == ["fail"]


def test_other_models_are_left_alone(copied: Built) -> None:
    assert open_checkpoint(copied("llama", vocab_size=32000, hidden_size=8, head_dim=4)).repair is None
