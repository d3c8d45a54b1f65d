"""Whole models loaded through transformers, in one way: the checkpoint's own weights, whatever lies beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import shortstack
from shortstack.engine.load import load_model, load_whole, losses_over
from shortstack.errors import ShortstackError
from shortstack.evaluation.options import EvaluationOptions
from shortstack.evaluation.ppl import evaluate_ppl
from shortstack.families.open_model import open_checkpoint, open_model
from shortstack.inspection.check import check
from shortstack.pruning.prune import prune
from tests import adapters, oracle, pico

Built = Callable[..., Path]
SOURCE = Path(shortstack.__file__).parent


@pytest.fixture
def run_folder(copied: Built) -> Path:
    """As trainers leave it that save the merged model into the folder of the run, where the adapter lies."""
    model = copied("llama")
    adapters.build(model, model)
    assert (model / "adapter_model.safetensors").is_file()
    return model


@pytest.mark.fault(96)
def test_an_adapter_beside_the_weights_is_never_put_on_top(
    run_folder: Path, built: Built, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _, _ = load_model(open_model(str(run_folder)), dtype="float32", device="cpu")
    assert torch.equal(adapters.logits(model), adapters.logits(pico.load(built("llama"))))
    assert model.config._name_or_path == str(run_folder)
    said = capsys.readouterr().err
    assert "is ignored (README.md" not in said
    assert "an adapter beside the model's weights is ignored (adapter_config.json, adapter_model.safetensors)" in said
    assert "not in the index" not in said


@pytest.mark.fault(96)
def test_it_is_not_copied_and_every_command_sees_the_same_weights(
    run_folder: Path, built: Built, tmp_path: Path
) -> None:
    prune(str(run_folder), blocks="1,3", out=tmp_path / "out", verify=True, quiet=True)
    assert not list((tmp_path / "out").glob("adapter*"))
    ids = torch.tensor(pico.windows(2, 20))
    with torch.no_grad():
        expected = oracle.bypassed(pico.load(built("llama")), {1, 3})(input_ids=ids, use_cache=False).logits
    assert torch.equal(adapters.logits(pico.load(tmp_path / "out")), expected)
    text = tmp_path / "text.txt"
    text.write_text("Three wise women went to sea in a bowl. " * 40)
    results = evaluate_ppl(
        str(run_folder), str(built("llama")), data=str(text), seq_len="32", options=EvaluationOptions(quiet=True)
    )
    with_adapter_beside, alone = (result.figures for result in results.results)
    assert with_adapter_beside == alone


@pytest.mark.fault(96)
def test_check_says_what_others_make_of_it_and_looks_at_the_weights_alone(run_folder: Path) -> None:
    found = {finding.what: finding for finding in check(str(run_folder), quiet=True).findings}
    assert found["adapter"].status == "note"
    assert "transformers applies the adapter to the weights" in found["adapter"].says
    assert found["unexpected keys"].status == "ok"


@pytest.mark.fault(96)
def test_where_links_cannot_be_made(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(ShortstackError, match="links to the weights alone cannot be made") as caught:
        load_model(open_model(str(run_folder)), dtype="float32", device="cpu")
    assert caught.value.hint == "move adapter_config.json, adapter_model.safetensors to another directory"


def test_nothing_loads_weights_by_another_way() -> None:
    # What a card shows a reader, and what runs in the environment of another engine, where this package is not.
    others = {"publishing/card_text.py", "benchmark/engines/foreign/worker.py"}
    loading = [
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if "AutoModelForCausalLM.from_pretrained(" in path.read_text(encoding="utf-8")
    ]
    assert set(loading) - others == {"engine/load.py"}


def test_weights_that_are_missing_are_never_random(copied: Built) -> None:
    model = copied("llama")
    checkpoint = open_checkpoint(model)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for load in (
        lambda: load_whole(checkpoint, dtype=torch.float32),
        lambda: load_model(checkpoint, dtype="float32", device="cpu"),
    ):
        with pytest.raises(ShortstackError, match=r"the weights lack 'model\.norm\.weight' \(1\)"):
            load()


def test_measuring_leaves_the_model_as_it_was(built: Built) -> None:
    model = pico.load(built("llama")).train()
    seen = []

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append((model.training, torch.is_grad_enabled(), batch["x"].item()))
        if batch["x"] > 1:
            raise ValueError("no")
        return batch["x"] * 2

    assert losses_over(model, [{"x": torch.tensor(1)}], loss, torch.device("cpu")) == [torch.tensor(2)]
    with pytest.raises(ValueError, match="no"):
        losses_over(model, [{"x": torch.tensor(5)}], loss, torch.device("cpu"))
    assert seen == [(False, False, 1), (False, False, 5)]
    assert model.training
