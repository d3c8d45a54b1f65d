"""What is refused before anything is done, and in which words; configurations that are shipped."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.cli.app import run
from shortstack.errors import ShortstackError, UsageError
from tests.retraining.processes import ROOT

Retrained = Callable[..., Any]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """As if a package were not installed."""
    real = importlib.util.find_spec

    def hide(name: str) -> None:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda asked, *more: None if asked == name else real(asked, *more)
        )

    return hide


@pytest.mark.parametrize(("way", "package"), [("lora", "peft"), ("cpt", "accelerate"), ("distill", "accelerate")])
def test_a_missing_package_is_named_with_its_extra(
    way: str, package: str, without: Callable[[str], None], pruned: Path, rows: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    without(package)
    code = run(["retrain", way, str(pruned), "--data", str(rows), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert code == 2
    assert f"retrain {way} needs {package}" in said
    assert "pip install 'shortstack[retrain]'" in said


def test_four_bits_need_their_package(retrained: Retrained, without: Callable[[str], None], tmp_path: Path) -> None:
    without("bitsandbytes")
    with pytest.raises(UsageError, match="--load-in-4bit needs bitsandbytes") as error:
        retrained("lora", tmp_path / "out", load_in_4bit=True)
    assert error.value.hint == "pip install bitsandbytes"


CASES: list[tuple[dict[str, Any], str]] = [
    ({"save_every": 0}, "save_every=0: expected at least 1"),
    ({"max_steps": 0}, "max_steps=0: expected at least 1"),
    ({"lr": 0.0}, "--lr 0.0: expected a number between 0 and 1"),
    ({"lr": 3.0}, "--lr 3.0"),
    ({"tokens": "many"}, "--tokens"),
    ({"tokens": "0"}, "--tokens"),
    ({"batch": 3}, "--batch 3 is not a multiple of 2"),
    ({"train": "tail"}, "--train 'tail': unknown"),
    ({"dtype": "float64"}, "--dtype float64: not supported in training"),
    ({"device": "cuda"}, "cuda"),
    ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
]


@pytest.mark.parametrize(("changed", "says"), CASES, ids=[str(case[0]) for case in CASES])
def test_a_request_that_makes_no_sense(
    changed: dict[str, Any], says: str, retrained: Retrained, tmp_path: Path
) -> None:
    import torch

    if changed == {"device": "cuda"} and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ShortstackError, match=says) as error:
        retrained("cpt", tmp_path / "out", **changed)
    assert len(error.value.message.splitlines()) == 1
    assert not (tmp_path / "out").exists()


NONSENSE: list[tuple[str, dict[str, Any], str]] = [
    ("distill", {"temperature": 0.0}, "--temperature 0.0: expected a number above 0"),
    ("distill", {"temperature": -1.0}, "--temperature -1.0: expected a number above 0"),
    ("distill", {"temperature": math.nan}, "--temperature nan: expected a number above 0"),
    ("distill", {"kl_weight": math.nan}, "--kl-weight nan .*expected none below 0"),
    ("distill", {"epochs": 0}, "--epochs 0: expected a number above 0"),
    ("cpt", {"validation": -1}, "validation=-1: expected at least 0"),
    ("cpt", {"eval_windows": 0}, "eval_windows=0: expected at least 1"),
    ("cpt", {"warmup": -1}, "--warmup -1: expected at least 0"),
    ("cpt", {"weight_decay": -0.1}, "--weight-decay -0.1: expected"),
    ("cpt", {"seq_len": 1}, "--seq-len 1: expected at least 2"),
    ("lora", {"rank": 0}, "--rank 0: expected at least 1"),
    ("lora", {"alpha": 0.0}, "--alpha 0.0: expected"),
    ("lora", {"dropout": 1.0}, "--dropout 1.0: expected"),
    ("lora", {"target_modules": "q_proj,,v_proj"}, "--target-modules 'q_proj,,v_proj': expected names"),
    ("lora", {"target_modules": "q_porj"}, "--target-modules q_porj: .* has no such linear layer in its blocks"),
    (
        "lora",
        {"prompt_template": "nowhere.json"},
        "--prompt-template nowhere.json: neither the name of a template nor a file",
    ),
    (
        "lora",
        {"prompt_template": "x.json", "instruction": False},
        "--prompt-template x.json --no-instruction: one requires",
    ),
]
IDLE: list[tuple[str, dict[str, Any], str]] = [
    ("offline", {"seq_len": 64}, "--seq-len 64: no effect with --offline"),
    ("offline", {"isolate_documents": False}, "--no-isolate-documents: no effect with --offline"),
    ("offline", {"validation": 3}, "--validation 3: no effect with --offline"),
    ("distill", {"rank": 4, "alpha": 8}, "--rank 4, --alpha 8: no effect with --train all"),
    ("distill", {"train": "lora", "weight_decay": 0.2}, "--weight-decay 0.2: no effect with --train lora"),
    ("distill", {"kl_weight": 0.0, "temperature": 2.0}, "--temperature 2.0: no effect with --kl-weight 0"),
    ("distill", {"epochs": 3, "tokens": "1000"}, "--epochs 3: no effect with --tokens"),
    ("lora", {"epochs": 3, "tokens": "1000"}, "--epochs 3: no effect with --tokens"),
    ("lora", {"merge": False, "save_dtype": "float16"}, "--save-dtype float16: no effect with --no-merge"),
    ("distill", {"data": "rows", "isolate_documents": False}, "--no-isolate-documents: no effect on rows"),
    ("lora", {"data": "text", "group_by_length": True}, "--group-by-length: no effect on text"),
    (
        "lora",
        {"data": "text", "instruction": False, "train_on_inputs": True},
        "--no-instruction, --train-on-inputs: no effect",
    ),
    ("lora", {"data": "text", "add_eos": False}, "--no-add-eos: no effect on .*text"),
    ("distill", {"target_modules": "q_proj"}, "--target-modules q_proj: no effect with --train all"),
    ("cpt", {"eval_windows": 3}, "eval_windows=3: no effect without eval_data"),
    ("cpt", {"restart": True, "weights_only_resume": True}, "weights_only_resume=True: no effect with restart=True"),
]


@pytest.mark.parametrize(("way", "changed", "says"), [*NONSENSE, *IDLE], ids=str)
def test_numbers_out_of_range_and_options_without_effect(
    way: str, changed: dict[str, Any], says: str, retrained: Retrained, rows: Path, text: Path, tmp_path: Path
) -> None:
    """Nothing that is given is replaced or ignored."""
    sources = {"rows": str(rows), "text": str(text)}
    given = {name: sources.get(value, value) if name == "data" else value for name, value in changed.items()}
    with pytest.raises(UsageError, match=says) as error:
        retrained(way, tmp_path / "out", **given)
    assert len(error.value.message.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_quantized_checkpoint_is_not_trained(
    copied: Callable[..., Path], retrained: Retrained, tmp_path: Path
) -> None:
    import json

    model = copied("llama")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ShortstackError, match="quantized") as error:
        retrained("cpt", tmp_path / "out", model=model)
    assert "retrain the checkpoint before" in (error.value.hint or "")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_are_what_accelerate_reads(path: Path) -> None:
    """Every entry is known to it, and every file shards as shortstack supports it."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.distributed_type.value == "FSDP"
    assert config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"
    assert config.num_processes == 8 * config.num_machines
