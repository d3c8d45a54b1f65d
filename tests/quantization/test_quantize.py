"""`shortstack quantize` on pico models, with llm-compressor itself; the commands that follow work on its result as on any."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shortstack.cli.app import run
from shortstack.data.embedded import heldout_documents
from shortstack.errors import ShortstackError
from shortstack.evaluation.ppl import evaluate_ppl
from shortstack.families.open_model import open_checkpoint
from shortstack.inspection.check import check
from shortstack.inspection.info import info
from shortstack.pruning.prune import prune
from shortstack.quantization import quantize as room
from shortstack.quantization.quantize import QuantizeResult, quantize
from tests import pico

pytest.importorskip("llmcompressor", reason="llm-compressor is not installed: pip install 'shortstack[quantize]'")

Built = Callable[..., Path]
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 4, "dtype": torch.bfloat16,
}  # fmt: skip
QUICK: dict[str, Any] = {"samples": 8, "eval_data": "none", "quiet": True}


@pytest.fixture(scope="module")
def pruned(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model of six blocks without two of them."""
    out = tmp_path_factory.mktemp("pruned") / "p"
    prune(str(built(tie_word_embeddings=True, **{**SIZES, "num_hidden_layers": 6})), out=out, blocks="1,4", quiet=True)
    (out / "tokenizer_config.json").write_text(
        json.dumps({**json.loads((out / "tokenizer_config.json").read_text()), "tokenizer_class": "LlamaTokenizer"})
    )
    return out


@pytest.fixture(scope="module")
def result(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizeResult:
    out = tmp_path_factory.mktemp("quantized") / "q"
    modules, before = set(sys.modules), contents(pruned)
    found = quantize(str(pruned), out=out, samples=8, quiet=True)
    assert not [name for name in set(sys.modules) - modules if name.startswith(("llmcompressor", "loguru"))]
    assert contents(pruned) == before
    assert [path.name for path in out.parent.iterdir()] == ["q"]
    return found


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def dequantized(tensors: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    """What the numbers of a W4A16 layer stand for, worked out here: eight to a word, lowest bits first, 8 is zero."""
    packed, scale = tensors[f"{layer}.weight_packed"], tensors[f"{layer}.weight_scale"].float()
    rows, columns = tensors[f"{layer}.weight_shape"].tolist()
    steps = (
        torch.stack([(packed >> shift) & 15 for shift in range(0, 32, 4)], dim=-1).reshape(rows, -1)[:, :columns] - 8
    )
    return steps * scale.repeat_interleave(columns // scale.shape[1], dim=1)


def test_every_matrix_is_near_what_it_was_and_all_else_is_the_same(result: QuantizeResult, pruned: Path) -> None:
    before, after = load_file(pruned / "model.safetensors"), load_file(result.out / "model.safetensors")
    layers = [name.removesuffix(".weight") for name in before if name.endswith("_proj.weight")]
    assert len(layers) == 7 * 4
    for layer in layers:
        exact, found = before[f"{layer}.weight"].float(), dequantized(after, layer)
        assert (found - exact).norm() < 0.25 * exact.norm(), layer
    for name in set(before) - {f"{layer}.weight" for layer in layers}:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name]), name
    assert result.choice.groups[32] == ("mlp.down_proj",)
    assert result.nbytes[1] < 0.4 * result.nbytes[0]


def test_tied_stays_tied(result: QuantizeResult) -> None:
    assert "lm_head.weight" not in open_checkpoint(result.out).tensors
    model = pico.load(result.out)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_config_and_companions_are_the_source_s(result: QuantizeResult, pruned: Path) -> None:
    config = json.loads((result.out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((pruned / "config.json").read_text())
    assert quantization["quant_method"] == "compressed-tensors"
    assert {group["weights"]["group_size"] for group in quantization["config_groups"].values()} == {64, 32}
    assert {group["weights"]["actorder"] for group in quantization["config_groups"].values()} == {"static"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (result.out / name).read_bytes() == (pruned / name).read_bytes()
    names = {path.name for path in result.out.iterdir()}
    assert names == {path.name for path in pruned.iterdir()}  # nothing of llm-compressor's own


def test_history_blocks_and_hashes(result: QuantizeResult, pruned: Path) -> None:
    checkpoint = open_checkpoint(result.out)
    assert checkpoint.original_blocks == open_checkpoint(pruned).original_blocks == (0, 2, 3, 5)
    record = checkpoint.provenance
    assert record is not None
    assert [step["stage"] for step in record["steps"]] == ["prune", "quantize"]
    step = record["steps"][1]
    assert (step["scheme"], step["method"], step["actorder"]) == ("W4A16", "gptq", "static")
    assert (step["calibration"]["samples"], step["calibration"]["seq_len"]) == (8, 64)
    assert {"llmcompressor", "compressed-tensors"} <= set(step["versions"])
    here = contents(result.out)
    del here["shortstack.json"]
    assert record["files"] == here == result.files
    card = (result.out / "README.md").read_text()
    assert "without 2 of its 6 Transformer blocks, quantized\n" in card
    assert "2. quantized to W4A16 (gptq), calibrated on 8 windows of 64 tokens of embedded" in card


def test_sizes_and_perplexities_are_told(result: QuantizeResult) -> None:
    before, after = result.ppl["embedded"]
    assert before.value is not None
    assert after.value == pytest.approx(before.value, rel=0.1)
    assert result.peak_rss_bytes > 100e6
    lines = result.to_text().splitlines()
    assert "in W4A16, in " in lines[0]
    assert lines[3].startswith("bytes ")
    assert lines[4].startswith("ppl of embedded ")
    record = json.loads(json.dumps(result.to_json()))
    assert record["ppl"]["embedded"]["after"]["value"] == after.value
    assert record["bytes"] == {"before": result.nbytes[0], "after": result.nbytes[1]}


def test_the_commands_that_follow_work_on_it(result: QuantizeResult, pruned: Path, tmp_path: Path) -> None:
    of_both = evaluate_ppl(str(pruned), str(result.out), seq_len="32", quiet=True).results
    assert of_both[0].parameters == of_both[1].parameters
    assert of_both[1].figures["ppl_32"].value == pytest.approx(of_both[0].figures["ppl_32"].value, rel=0.1)
    statuses = {finding.status for finding in check(str(result.out), quiet=True).findings}
    assert not statuses & {"fail", "skip"}
    told = info(str(result.out))
    assert (told.parameters, told.blocks, told.tied) == (info(str(pruned)).parameters, 4, True)
    cut = prune(str(result.out), out=tmp_path / "cut", blocks="3", verify=True, quiet=True)
    assert "equal bit for bit" in (cut.verified or "")
    assert open_checkpoint(cut.out).original_blocks == (0, 2, 5)
    assert cut.plan.after["parameters"] == told.parameters - told.parameters_per_block[2]


@pytest.mark.parametrize("scheme", ["W8A16", "W8A8", "FP8_DYNAMIC", "NVFP4A16"])
def test_other_schemes(scheme: Any, pruned: Path, tmp_path: Path) -> None:
    found = quantize(str(pruned), out=tmp_path / "q", scheme=scheme, **QUICK)
    assert (found.calibration is None) == (scheme in ("FP8_DYNAMIC", "NVFP4A16"))
    assert found.nbytes[1] < 0.7 * found.nbytes[0]
    assert info(str(found.out)).parameters == info(str(pruned)).parameters
    findings = check(str(found.out), quiet=True).findings
    assert {finding.status for finding in findings if finding.status in ("fail", "skip")} == set()
    of_both = evaluate_ppl(str(pruned), str(found.out), seq_len="32", quiet=True).results
    assert of_both[1].figures["ppl_32"].value == pytest.approx(of_both[0].figures["ppl_32"].value, rel=0.1)


def test_a_head_of_its_own_and_a_layer_that_no_group_divides(built: Built, tmp_path: Path) -> None:
    """float16, as Vicuna; whatever is not quantized keeps its bytes and is named."""
    source = built(**{**SIZES, "intermediate_size": 80, "dtype": torch.float16})
    found = quantize(str(source), out=tmp_path / "q", **QUICK)
    before, after = open_checkpoint(source), open_checkpoint(found.out)
    assert not after.tied
    for name in ("lm_head.weight", "model.layers.2.mlp.down_proj.weight"):
        assert after.tensors[name].dtype == before.tensors[name].dtype == "F16"
    assert "left dense: mlp.down_proj (80 inputs are no whole number of groups of 128 or 64 or 32)" in found.to_text()


def test_float32_is_stored_in_16_bits_and_both_entries_say_so(copied: Built, tmp_path: Path) -> None:
    source = copied(**{**SIZES, "dtype": torch.float32})
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "torch_dtype": "float32", "dtype": "float32"}))
    found = quantize(str(source), out=tmp_path / "q", sampling="joined", **QUICK)
    config = json.loads((found.out / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert {t.dtype for t in open_checkpoint(found.out).tensors.values()} == {"BF16", "I32", "I64"}
    assert found.says == ["what is left dense was F32 and is stored in bfloat16 now"]
    assert found.calibration is not None
    assert found.calibration["sampling"] == "joined"


def test_a_tokenizer_in_place_of_the_checkpoint_s_own(pruned: Path, tmp_path: Path) -> None:
    """It reads the windows and the texts, and is the result's."""
    shutil.copytree(pruned, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    pico.tokenizer(backwards=True).save_pretrained(tmp_path / "other")
    out = tmp_path / "out"
    found = quantize(str(tmp_path / "bare"), out=out, samples=2, tokenizer=str(tmp_path / "other"), quiet=True)
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "other/tokenizer.json").read_bytes()
    assert found.files["tokenizer.json"]
    assert all(figure.value for pair in found.ppl.values() for figure in pair)
    calibration = json.loads((out / "shortstack.json").read_text())["steps"][-1]["calibration"]
    assert calibration["tokenizer"]["source"] == str(tmp_path / "other")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": list(range(3, 35))}) + "\n")
    given = quantize(
        str(tmp_path / "bare"), out=tmp_path / "ids", data=str(rows), samples=1, eval_data="none", quiet=True
    )
    assert "tokenizer.json" not in given.files, "rows of token ids need no tokenizer"


def test_links_out_of_the_checkpoint_are_followed_on_request(pruned: Path, tmp_path: Path) -> None:
    elsewhere, model = tmp_path / "elsewhere", tmp_path / "model"
    shutil.copytree(pruned, elsewhere)
    model.mkdir()
    for path in elsewhere.iterdir():
        (model / path.name).symlink_to(path)
    with pytest.raises(ShortstackError, match="is a link to") as caught:
        quantize(str(model), out=tmp_path / "q", **QUICK)
    assert "--allow-links" in caught.value.hint
    found = quantize(str(model), out=tmp_path / "q", allow_links=True, **{**QUICK, "eval_data": "embedded"})
    assert not [path for path in found.out.iterdir() if path.is_symlink()]
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in found.out.iterdir():
        (linked / path.name).symlink_to(path)
    statuses = {finding.status for finding in check(str(linked), allow_links=True, quiet=True).findings}
    assert not statuses & {"fail", "skip"}


def refused(says: str, tmp_path: Path, *arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    assert run(["quantize", *map(str, arguments), "--out", str(tmp_path / "q")]) in (1, 2)
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert not [path for path in tmp_path.iterdir() if "q" in path.name and path.name != "quantized"]
    return error


def test_a_text_that_nobody_chose_is_said(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SmolLM2 in 4 bits, calibrated on it, lost more on other text than calibrated on text from the web."""

    def refuse(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "run_worker", refuse)
    (tmp_path / "text.txt").write_text("Some words that a user gave, and some more. " * 200)
    for data, said in (("embedded", True), (str(tmp_path / "text.txt"), False)):
        calibration = {**QUICK, "quiet": False, "samples": 2, "data": data}
        with pytest.raises(KeyboardInterrupt):
            quantize(str(pruned), out=tmp_path / "q", **calibration)
        assert ("so the model can lose more on other text: give text" in capsys.readouterr().err) is said


@pytest.mark.fault(29)
@pytest.mark.fault(40)
def test_bad_input(
    result: QuantizeResult,
    pruned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused("groups of 100", tmp_path, pruned, "--group-size", 100, capsys=capsys)
    refused("is quantized already", tmp_path, result.out, capsys=capsys)
    (tmp_path / "short.txt").write_text("hardly any text")
    for sampling in ("documents", "joined"):
        says = "128 windows of 64 tokens need 8192 tokens, found"
        error = refused(says, tmp_path, pruned, "--data", tmp_path / "short.txt", "--sampling", sampling, capsys=capsys)
        assert "hint: give more text" in error
    refused("windows of 100 tokens, but", tmp_path, pruned, "--seq-len", 100, "--samples", 2, capsys=capsys)
    with monkeypatch.context() as patch:
        patch.setattr(room, "available_bytes", lambda: 1000)
        refused("of memory needed to quantize it", tmp_path, pruned, capsys=capsys)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))  # type: ignore[attr-defined]
        refused("GB needed, 0.00 GB free", tmp_path, pruned, capsys=capsys)


def test_a_result_that_does_not_hold_is_not_written(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's output is compared with the source: a dense tensor that it changed, a layer that it left out."""
    real = room.run_worker

    def changing(job: Any, **options: Any) -> dict[str, Any]:
        report = real(job, **options)
        path = Path(job.out) / "model.safetensors"
        raw = bytearray(path.read_bytes())
        norm = open_checkpoint(job.out).tensors["model.norm.weight"]
        raw[norm.start] ^= 1
        path.write_bytes(raw)
        return report

    monkeypatch.setattr(room, "run_worker", changing)
    with pytest.raises(ShortstackError, match=r"changed 'model\.norm\.weight', which is not quantized"):
        quantize(str(pruned), out=tmp_path / "q", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_layers_of_another_kind_than_linear_are_refused(built: Built, tmp_path: Path) -> None:
    source = built("gpt2", n_embd=64, n_head=4)
    with pytest.raises(ShortstackError, match=r"none of its layers is of type Linear \(.* is a Conv1D\)"):
        quantize(str(source), out=tmp_path / "q", **QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_real_model(real_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "evaluation.txt"
    text.write_text("\n\n".join(document.text for document in heldout_documents())[:8000])
    found = quantize(str(real_model), out=tmp_path / "q", samples=4, seq_len=256, eval_data=str(text), quiet=True)
    before, after = found.ppl[str(text)]
    assert before.value is not None
    assert after.value is not None
    assert after.value < 1.5 * before.value
    assert found.nbytes[1] < 0.43 * found.nbytes[0]
