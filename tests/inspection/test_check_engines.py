"""`shortstack check --engine`: what an engine writes is judged by transformers' logits, and every failure ends in words."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shortstack.benchmark.engines import open_engine
from shortstack.benchmark.options import EngineOptions
from shortstack.cli.app import run
from shortstack.errors import ShortstackError, UsageError
from shortstack.inspection.check import check
from shortstack.inspection.check_engines import _TEXTS, NEW_TOKENS, EngineCheck, _new_tokens, _prompts, others
from shortstack.inspection.findings import Finding
from tests.benchmark.engines.fake import environments, programs
from tests.benchmark.material import subject
from tests.gguf import write

Built = Callable[..., Path]
LIMIT, SHORT = 20.0, 0.5
SIZES: dict[str, Any] = {"max_position_embeddings": 256}


@pytest.fixture(autouse=True)
def _no_folder_of_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHORTSTACK_ENGINES", "SHORTSTACK_CONVERTER_PYTHON"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model(built: Built) -> Path:
    return built("llama", **SIZES)


@pytest.fixture
def gguf(model: Path, tmp_path: Path) -> Path:
    return write(tmp_path / "some.gguf", {}, {"blk.0.ffn_up.weight": ("Q8_0", np.ones((2, 32), np.float32))})


def engines(model: Path, **options: Any) -> dict[str, Finding]:
    """The lines of a check that are about engines."""
    if options.get("engine") != "transformers" or options.get("engine_python"):  # else no program is started
        options.setdefault("time_limit", LIMIT)
    return {finding.what: finding for finding in check(str(model), quiet=True, **options).findings}


def written(model: Path) -> tuple[list[list[int]], float]:
    """What transformers writes; and how far its second choice for the last token of the first prompt is below that."""
    one = subject(model)
    prompts = _prompts(one)
    tokens = open_engine("transformers", one, EngineOptions()).greedy(prompts, _new_tokens(one, prompts))
    with torch.no_grad():
        logits = one.model(torch.tensor([[*prompts[0], *tokens[0][:-1]]])).logits[0, -1]
    best, second = logits.topk(2).values.tolist()
    return tokens, best - second


def with_second_choice(model: Path, tokens: list[list[int]]) -> list[list[int]]:
    one = subject(model)
    with torch.no_grad():
        logits = one.model(torch.tensor([[*_prompts(one)[0], *tokens[0][:-1]]])).logits[0, -1]
    return [[*tokens[0][:-1], int(logits.topk(2).indices[1])], *tokens[1:]]


def ids(model: Path) -> dict[str, list[int]]:
    return {text: list(subject(model).tokenizer(text)["input_ids"]) for text in _TEXTS}


def test_the_same_tokens(model: Path, tmp_path: Path) -> None:
    tokens, _ = written(model)
    assert [len(row) for row in tokens] == [NEW_TOKENS] * 4
    found = engines(model, engine="vllm", engine_python=programs(tmp_path / "bin", tokens=tokens) / "python")
    assert found["vllm"].status == "ok"
    assert found["vllm"].says == (
        "4 prompts, 32 new tokens each: the tokens of transformers in float32; vllm 0.32.0, float32"
    )
    assert found["cached generation"].status == "ok"  # the other checks are made too


def test_another_token_is_told_with_both_logits(model: Path, tmp_path: Path) -> None:
    tokens, gap = written(model)
    wrong = with_second_choice(model, tokens)
    assert gap > 0.01
    found = engines(model, engine="vllm", engine_python=programs(tmp_path / "bin", tokens=wrong) / "python")["vllm"]
    assert found.status == "fail"
    assert f"new token 32 of prompt 1 is {wrong[0][-1]} " in found.says
    assert f", that of transformers in float32 {tokens[0][-1]} " in found.says
    assert f"their logits differ by {gap:.2g} there" in found.says
    assert "1 tokens are not its first choice" in found.says
    assert "which rounding does not explain" in found.says


def test_what_rounding_explains_is_a_note(model: Path, gguf: Path, tmp_path: Path) -> None:
    """Weights of 8 bits compute another model: a near second choice is no fault of the engine."""
    tokens, gap = written(model)
    assert gap < 1.0
    folder = programs(tmp_path / "bin", tokens=with_second_choice(model, tokens), ids=ids(model))
    found = engines(gguf, of=model, engine_binary=folder)
    assert found["llama.cpp"].status == "note"
    assert "which rounding explains; llama.cpp , Q8_0" in found["llama.cpp"].says
    assert found["llama.cpp tokenizer"].status == "ok"
    assert found["GGUF file"].says == f"weights of type Q8_0, compared with {model}"


def test_tokens_after_a_wrong_one_are_judged_by_their_own_context(model: Path) -> None:
    one = subject(model)
    prompts = [[3, 4, 5]]
    tokens = open_engine("transformers", one, EngineOptions()).greedy(prompts, 6)
    assert list(others(one.model, prompts, tokens)) == []
    second = (tokens[0][0] + 1) % one.rows
    after = open_engine("transformers", one, EngineOptions()).greedy([[3, 4, 5, second]], 5)
    (only,) = others(one.model, prompts, [[second, *after[0]]])
    assert (only.prompt, only.at, only.token, only.first) == (0, 0, second, tokens[0][0])


class Stub:
    """Whatever it is given, these are its logits at every position."""

    def __init__(self, logits: list[float]) -> None:
        self._logits = torch.tensor(logits)

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return type("Output", (), {"logits": self._logits.repeat(1, input_ids.shape[1], 1)})


def test_an_engine_may_suppress_the_end_of_text() -> None:
    stub = Stub([0.0, 1.0, 3.0, 2.5])
    assert list(others(stub, [[0]], [[2, 2]])) == []
    assert [(one.at, one.first, one.gap) for one in others(stub, [[0]], [[2, 3]])] == [(1, 2, 0.5)]
    assert list(others(stub, [[0]], [[2, 3]], special=[2])) == []  # 2 is the end of text: the next best is 3
    assert [(one.at, one.first) for one in others(stub, [[0]], [[1, 2]], special=[2])] == [(0, 3)]
    assert list(others(Stub([1.0, 1.0]), [[0]], [[0, 1]])) == []  # a tie has two first choices


@pytest.mark.fault(86)
@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        (
            {"worker": "hang"},
            "vllm: no answer within 0.50 s; its last message: loading the model (set a longer --time-limit)",
        ),
        (
            {"worker": "die"},
            "ended with exit code 3 before it answered; its last message: RuntimeError: the engine has no kernel",
        ),
        ({"worker": "rubbish"}, "vllm: expected a line of JSON, found 'INFO loading'"),
        ({"worker": "raise"}, "vllm: ValueError: no such architecture"),
        ({"tokens": [[1]]}, "vllm: expected 4 rows of 32 tokens, found"),
        ({"tokens": ["x", "y", "z", None]}, "vllm: expected 4 rows of 32 tokens, found"),
        ({"tokens": [["x"] * NEW_TOKENS] * 4}, "vllm: expected 4 rows of 32 tokens, found"),
        ({"tokens": [[10**6] * NEW_TOKENS] * 4}, "token 1000000, but the embedding has 260 rows"),
        ({"version": "0.6.1"}, "vLLM 0.6.1 is too old: expected 0.9 or newer"),
        (
            {"worker": "raise", "error": "AttributeError: '_C' object has no attribute 'cpu_gemm_wna16'"},
            "need a processor with AVX-512, which this one lacks",
        ),
    ],
)
def test_an_engine_that_misbehaves_fails_the_check(
    behaviour: dict[str, Any], says: str, model: Path, tmp_path: Path
) -> None:
    python = programs(tmp_path / "bin", **behaviour) / "python"
    limit = SHORT if behaviour.get("worker") == "hang" else LIMIT
    found = engines(model, engine="vllm", engine_python=python, time_limit=limit)["vllm"]
    assert found.status == "fail"
    assert says in found.says


def converter(folder: Path, monkeypatch: pytest.MonkeyPatch, made: Path) -> Path:
    """A converter that copies a file, or fails where there is none; where its output went is in `out`."""
    python = folder / "python"
    folder.mkdir()
    python.write_text(f'#!/bin/sh\necho "$5 $7" > {folder}/out\ncp {made} "$5" || {{ echo "boom" >&2; exit 1; }}\n')
    python.chmod(0o755)
    monkeypatch.setenv("SHORTSTACK_CONVERTER_PYTHON", str(python))
    return folder / "out"


def test_a_checkpoint_is_converted_for_the_check_alone(
    model: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, _ = written(model)
    folder = programs(tmp_path / "bin", tokens=tokens, ids=ids(model))
    missing = engines(model, engine="llama.cpp", engine_binary=folder)["llama.cpp"]
    assert "shortstack export gguf" in missing.says  # no converter is there
    out = converter(tmp_path / "convert", monkeypatch, gguf)
    found = engines(model, engine="llama.cpp", engine_binary=folder)
    assert found["llama.cpp"].status == "ok", found["llama.cpp"].says
    file, kind = out.read_text().split()
    assert kind == "f32"
    assert not Path(file).exists()
    converter(tmp_path / "broken", monkeypatch, tmp_path / "none")
    failed = engines(model, engine="llama.cpp", engine_binary=folder)["llama.cpp"]
    assert (failed.status, "boom" in failed.says) == ("fail", True)


@pytest.mark.fault(86)
def test_a_tokenizer_that_reads_otherwise(model: Path, gguf: Path, tmp_path: Path) -> None:
    tokens, _ = written(model)
    other = {**ids(model), _TEXTS[-2]: [1, 2]}
    found = engines(gguf, of=model, engine_binary=programs(tmp_path / "a", tokens=tokens, ids=other))
    assert found["llama.cpp tokenizer"].status == "fail"
    assert f"{_TEXTS[-2]!r} is [1, 2], and [" in found["llama.cpp tokenizer"].says
    found = engines(gguf, of=model, engine_binary=programs(tmp_path / "b", tokens=tokens, ids="rubbish"))
    assert "expected the tokens of a text, found {}" in found["llama.cpp"].says


@pytest.mark.fault(86)
def test_engines_that_are_not_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("vllm", "llama.cpp", "mlx", "openvino"):
        assert run(["check", str(model), "--engine", name, "--quiet"]) == 2
        assert "was not found" in capsys.readouterr().err
    folder = environments(tmp_path / "engines", "mlx", tokens=written(model)[0])
    monkeypatch.setenv("SHORTSTACK_ENGINES", str(folder))
    found = engines(model, engine="found")
    assert {what: found[what].status for what in ("transformers", "mlx", "vllm", "llama.cpp", "openvino")} == {
        "transformers": "ok", "mlx": "ok", "vllm": "skip", "llama.cpp": "skip", "openvino": "skip",
    }  # fmt: skip
    assert "was not found" in found["openvino"].says


@pytest.mark.fault(86)
def test_an_engine_that_does_not_know_how_weights_are_quantized(model: Path, tmp_path: Path) -> None:
    error = "ValueError: Received 504 parameters not in model: \nmodel.layers.0.mlp.down_proj.weight_packed"
    python = programs(tmp_path / "bin", worker="raise", error=error) / "python"
    found = engines(model, engine="mlx", engine_python=python)["mlx"]
    assert "quantized in a way that mlx-lm does not support (ValueError: Received 504 parameters" in found.says


def test_a_gguf_file_needs_its_checkpoint(model: Path, gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="compared with the checkpoint that it was made from") as missing:
        check(str(gguf), quiet=True)
    assert "--of DIR" in missing.value.hint
    with pytest.raises(UsageError, match="which llama.cpp runs"):
        check(str(gguf), engine="vllm", of=model, quiet=True)
    with pytest.raises(ShortstackError, match="no such file"):
        check(str(tmp_path / "none.gguf"), of=model, quiet=True)
    (tmp_path / "no.gguf").write_bytes(b"not one")
    with pytest.raises(ShortstackError, match="not a GGUF file"):
        check(str(tmp_path / "no.gguf"), of=model, quiet=True)


def test_options_that_contradict(model: Path) -> None:
    for options, says in (
        ({"engine": "vlm"}, "--engine vlm: unknown"),
        ({"engine": "compiled"}, "--engine compiled: unknown"),
        ({"engine": "vllm,found"}, "`found` is all that are installed"),
        ({"engine": "vllm,mlx", "engine_python": Path(sys.executable)}, "are for one engine"),
        ({"engine_python": Path(sys.executable)}, "no effect without --engine"),
        ({"of": model}, "is not a GGUF file"),
    ):
        with pytest.raises(UsageError, match=says):
            check(str(model), quiet=True, **options)  # type: ignore[arg-type]


def test_a_checkpoint_that_does_not_load_is_given_to_no_engine(copied: Built) -> None:
    model = copied("llama")
    (model / "model.safetensors").unlink()
    found = engines(model, engine="transformers")["engines"]
    assert (found.status, found.says) == ("skip", "not tried: the checkpoint cannot be loaded")


def test_a_model_without_a_tokenizer(built: Built) -> None:
    found = engines(built("llama", with_tokenizer=False, **SIZES), engine="transformers")
    assert found["transformers"].status == "ok"


def test_too_little_memory_to_compare(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shortstack.inspection.check_engines.available_bytes", lambda: 1)
    found = engines(model, engine="transformers")["engines"]
    assert found.status == "skip"
    assert "in float32 to compare with" in found.says


@pytest.mark.slow
def test_transformers_of_another_environment(model: Path) -> None:
    """The worker itself, run by a real Python: ours."""
    found = engines(model, engine="transformers", engine_python=Path(sys.executable), time_limit=300.0)["transformers"]
    assert found.status == "ok", found.says


@pytest.mark.parametrize(
    ("options", "says"),
    [({"engine_binary": Path("bin")}, "--engine-binary bin"), ({"time_limit": 1.0}, "--time-limit 1.0")],
)
def test_options_that_transformers_has_no_use_for(options: dict[str, Any], says: str) -> None:
    """They were taken without a word."""
    with pytest.raises(UsageError) as refused:
        EngineCheck.of("transformers", EngineOptions(**options))
    assert refused.value.message.startswith(f"{says}: no effect with --engine transformers")
    EngineCheck.of("transformers", EngineOptions(engine_python=Path("python"), time_limit=1.0))
    EngineCheck.of("vllm", EngineOptions(**options))
