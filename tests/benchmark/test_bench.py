"""Measuring from end to end: figures and pairs, turns, rows that do not fit, interruptions, layouts, pictures."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import shortstack
from shortstack.artifacts.results import Result, load_results
from shortstack.benchmark import floors, memory, sweep
from shortstack.benchmark.bench import _ids_of_length
from shortstack.benchmark.engines import EngineError
from shortstack.benchmark.engines import transformers as in_process
from shortstack.benchmark.floors import Machine
from shortstack.cli.app import run
from shortstack.errors import ShortstackError, UsageError
from shortstack.recipes.dry_run import Rehearsal
from tests import pico
from tests.benchmark.engines.fake import calls, programs
from tests.benchmark.material import counted

FEW = {"runs": 4, "warmup": 1, "new_tokens": "4", "prompt_tokens": 8, "quiet": True}


@pytest.fixture
def models(built: Callable[..., Path], tmp_path: Path) -> list[str]:
    """A dense model, and it without two blocks."""
    dense = tmp_path / "dense"
    shutil.copytree(built("llama"), dense)
    shortstack.prune(str(dense), out=tmp_path / "cut", blocks="1,4", quiet=True)
    return [str(dense), str(tmp_path / "cut")]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, int]]:
    """Engines that only say who was called, on a machine that was measured before."""
    called: list[tuple[str, int, int, int]] = []
    monkeypatch.setattr(sweep, "open_engine", counted(called))
    monkeypatch.setattr(sweep, "measured_machine", lambda *_: Machine(1e9, 1e12))
    return called


def by_model(results: tuple[Result, ...]) -> dict[str, Result]:
    return {Path(result.model).name: result for result in results}


def test_figures_of_two_models(models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b.json"
    arguments = ["--batch", "1,2", "--new-tokens", "4", "--runs", "4", "--warmup", "1", "--compare", "--no-memory"]
    assert run(["bench", *models, *arguments, "--out", str(out), "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "float32 on cpu" in shown
    assert "3 runs after 1 of warm-up" in shown
    assert "GB/s" in shown
    assert "times as fast as" in shown
    results = load_results(out).results
    assert [(Path(one.model).name, one.settings["batch"]) for one in results] == [
        ("dense", 1),
        ("cut", 1),
        ("dense", 2),
        ("cut", 2),
    ]
    for one in results:
        assert one.what == "bench"
        assert {len(values) for values in one.per_item.values()} == {3}
        latency, prefill, decode = (one.per_item[name] for name in ("latency", "prefill", "decode"))
        assert latency == pytest.approx([a + b for a, b in zip(prefill, decode, strict=True)])
        assert one.per_item["tpot"] == pytest.approx([value / 3 for value in decode])
        assert one.per_item["throughput"] == pytest.approx([4 * one.settings["batch"] / value for value in latency])
        assert one.figures["latency"].value == sorted(latency)[1]
        assert one.figures["latency_p10"].value <= one.figures["latency"].value <= one.figures["latency_p99"].value  # type: ignore[operator]
        assert 0 < one.figures["tpot_floor"].value < 1  # type: ignore[operator]
        assert one.figures["prefill_floor_share"].value > 0  # type: ignore[operator]
        assert one.figures["latency_variation"].value is not None
    dense, cut = results[0].figures, results[1].figures
    assert "latency_speedup" not in dense
    for name in ("latency", "prefill", "decode"):
        assert cut[f"{name}_ideal"].value > 1  # type: ignore[operator]
        share = cut[f"{name}_of_ideal"]
        assert share.value == pytest.approx(cut[f"{name}_speedup"].value / cut[f"{name}_ideal"].value)  # type: ignore[operator]
        assert share.stderr is not None
    compared = shortstack.compare(out).to_json()
    latency = next(one for one in compared["figures"] if one["name"] == "latency")
    assert latency["differences"][1]["pairs"] == 3


def test_floors_are_of_the_type_that_an_engine_holds(
    models: list[str], log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GGUF file of 16 bits is read in half the time of float32."""
    floors: dict[str, dict[str, Any]] = {}
    for precision in ("float32", "F16", "Q8_0"):
        monkeypatch.setattr(sweep, "open_engine", counted(log, precision=precision))
        (result,) = shortstack.bench(models[0], memory=False, **FEW).results  # type: ignore[attr-defined]
        assert result.settings["dtype"] == precision
        floors[precision] = {name: result.figures[f"{name}_floor"] for name in ("tpot", "prefill")}
    assert floors["F16"]["tpot"].value == pytest.approx(floors["float32"]["tpot"].value / 2)
    assert floors["F16"]["prefill"].value is None
    assert floors["F16"]["prefill"].note == "the machine's products were measured in float32"
    assert floors["Q8_0"]["tpot"].value is None
    assert "weights of type Q8_0" in floors["Q8_0"]["tpot"].note


def test_models_take_turns_after_the_warm_up(models: list[str], log: list[Any]) -> None:
    result = shortstack.bench(*models, memory=False, compare=True, batch="2", **FEW)  # type: ignore[attr-defined]
    assert log[:2] == [("dense", 2, 0, 1), ("cut", 2, 0, 1)]
    assert [entry[0] for entry in log[2:8]] == ["dense", "cut", "cut", "dense", "dense", "cut"]
    # The machine became slower from run to run, and each run was a pair: the ratio is that of the blocks.
    found = by_model(result.results)
    assert found["cut"].figures["latency_speedup"].value == pytest.approx(6 / 4)
    assert found["cut"].figures["latency_speedup"].stderr == pytest.approx(0, abs=1e-12)
    assert found["dense"].figures["latency_variation"].value > 0  # type: ignore[operator]


def test_engines_that_load_for_every_call_take_turns_too(models: list[str], tmp_path: Path) -> None:
    folder = programs(tmp_path / "bin")
    result = shortstack.bench(*models, engine="vllm", engine_binary=folder, memory=False, **{**FEW, "runs": 5})  # type: ignore[attr-defined]
    ran = [call["arguments"] for call in calls(folder) if call["arguments"][:2] == ["bench", "latency"]]
    order = [
        (Path(one[3]).name, one[one.index("--num-iters") + 1])
        for one in ran
        if one[one.index("--output-len") + 1] == "4"
    ]
    assert order == [("dense", "2"), ("cut", "2"), ("cut", "2"), ("dense", "2")]
    found = by_model(result.results)
    assert len(found["dense"].per_item["latency"]) == 4
    assert found["dense"].settings["engine_version"] == "0.32.0"
    assert found["dense"].figures["served_rate"].value == 12.0
    assert any("random tokens of its own" in note for note in found["dense"].notes)


@pytest.mark.fault(86)
def test_times_stand_where_the_engines_throughput_fails(models: list[str], tmp_path: Path) -> None:
    folder = programs(tmp_path / "bin", throughput="rubbish")
    (one,) = shortstack.bench(models[0], engine="vllm", engine_binary=folder, memory=False, **FEW).results  # type: ignore[attr-defined]
    assert one.figures["latency"].value == pytest.approx(0.9)
    assert "served_rate" not in one.figures
    assert any(note.startswith("served_rate is not known: vllm bench throughput: its JSON") for note in one.notes)


def test_what_does_not_fit_is_a_row(
    models: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: list[Any]
) -> None:
    monkeypatch.setattr(sweep, "open_engine", counted(log, lambda name, batch: batch < 4 or name == "cut"))
    out = tmp_path / "b.json"
    result = shortstack.bench(*models, memory=False, compare=True, batch="1,4,8", out=out, csv=tmp_path / "csv", **FEW)  # type: ignore[attr-defined]
    rows = {(Path(one.model).name, one.settings["batch"]): one for one in load_results(out).results}
    assert rows["dense", 4].figures["latency"].value is None
    assert "out of memory at batch 4" in rows["dense", 4].figures["latency"].note
    assert rows["dense", 1].figures["latency"].value is not None
    assert rows["cut", 8].figures["latency"].value is not None
    assert rows["cut", 8].figures["latency_speedup"].value is None
    assert "does not fit" in result.to_text()
    assert not (tmp_path / "csv/dense/batch_gen_out4_bs4").exists()
    shortstack.compare(out)


def test_what_does_not_fit_beside_others_is_measured_alone(
    models: list[str], monkeypatch: pytest.MonkeyPatch, log: list[Any]
) -> None:
    def fits(name: str, batch: int) -> bool:
        return name == "cut" or any(entry[1] == -1 for entry in log)  # once the others were let go

    monkeypatch.setattr(sweep, "open_engine", counted(log, fits))
    result = shortstack.bench(*models, memory=False, **FEW)  # type: ignore[attr-defined]
    dense = by_model(result.results)["dense"]
    assert dense.figures["latency"].value is not None
    assert any("was measured alone" in note for note in dense.notes)


def test_what_cannot_fit_is_not_tried(models: list[str], monkeypatch: pytest.MonkeyPatch, log: list[Any]) -> None:
    monkeypatch.setattr(sweep, "available_bytes", lambda *_: 300_000)
    result = shortstack.bench(*models, memory=False, batch="1,64", **FEW)  # type: ignore[attr-defined]
    row = next(one for one in result.results if one.settings["batch"] == 64)
    assert "it needs" in row.figures["latency"].note
    assert not any(entry[1] == 64 for entry in log)
    monkeypatch.setattr(sweep, "available_bytes", lambda *_: 1000)
    with pytest.raises(ShortstackError, match="no configuration fits"):
        shortstack.bench(*models, memory=False, **FEW)  # type: ignore[attr-defined]


def test_models_that_do_not_fit_together_are_not_loaded_together(
    models: list[str], monkeypatch: pytest.MonkeyPatch, log: list[Any]
) -> None:
    monkeypatch.setattr(sweep, "available_bytes", lambda *_: 600_000)
    shortstack.bench(*models, memory=False, **FEW)  # type: ignore[attr-defined]
    names = [entry[0] for entry in log]
    assert names == sorted(names, reverse=True)  # all of dense, then all of cut


def test_a_real_out_of_memory_is_recognised(models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    generated = in_process.TransformersEngine._generated

    def failing(self: Any, one: Any, clock: Any) -> torch.Tensor:
        if one.batch == 2:
            model = self._subject.model
            with monkeypatch.context() as patch:
                patch.setattr(model, "generate", raise_out_of_memory)
                return generated(self, one, clock)
        return generated(self, one, clock)

    def raise_out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(in_process.TransformersEngine, "_generated", failing)
    result = shortstack.bench(models[0], memory=False, batch="1,2", **FEW)  # type: ignore[attr-defined]
    assert [one.figures["latency"].value is None for one in result.results] == [False, True]


def test_a_sweep_that_was_interrupted_resumes(
    models: list[str], monkeypatch: pytest.MonkeyPatch, log: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str, batch: int) -> bool:
        if batch == 2 and not resumed:
            raise KeyboardInterrupt
        return True

    resumed: list[bool] = []
    monkeypatch.setattr(sweep, "open_engine", counted(log, interrupted))
    with pytest.raises(KeyboardInterrupt):
        shortstack.bench(*models, memory=False, batch="1,2", **FEW)  # type: ignore[attr-defined]
    resumed.append(True)
    log.clear()
    result = shortstack.bench(*models, memory=False, batch="1,2", **{**FEW, "quiet": False})  # type: ignore[attr-defined]
    assert {entry[1] for entry in log} == {2, -1}  # batch 1 was not run again
    assert "resumed: measured before the interruption" in capsys.readouterr().err
    assert len(result.results) == 4
    log.clear()
    shortstack.bench(*models, memory=False, batch="1,2", **FEW)  # type: ignore[attr-defined]
    assert {1, 2} <= {entry[1] for entry in log}  # a sweep that ended is measured again


def test_an_interrupted_sweep_of_other_settings_is_none(
    models: list[str], monkeypatch: pytest.MonkeyPatch, log: list[Any]
) -> None:
    def never(name: str, batch: int) -> bool:
        if batch == 2:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(sweep, "open_engine", counted(log, never))
    for settings in (FEW, {**FEW, "runs": 5}, {**FEW, "seed": 1}):
        log.clear()
        with pytest.raises(KeyboardInterrupt):
            shortstack.bench(*models, memory=False, batch="1,2", **settings)  # type: ignore[attr-defined]
        assert any(entry[1] == 1 for entry in log)


def test_the_engine_that_fails_does_not_end_the_others(
    models: list[str], tmp_path: Path, log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shortstack.benchmark.engines import open_engine

    fake = counted(log)
    monkeypatch.setattr(
        sweep,
        "open_engine",
        lambda name, *rest: fake(name, *rest) if name == "transformers" else open_engine(name, *rest),
    )
    folder = programs(tmp_path / "bin", bench="die")
    result = shortstack.bench(models[0], engine="vllm,transformers", engine_binary=folder, memory=False, **FEW)  # type: ignore[attr-defined]
    assert {one.settings["engine"] for one in result.results} == {"transformers"}
    assert result.exit_code == 1
    assert "vllm is left out: vllm bench latency: ended with exit code 3" in result.to_text()
    with pytest.raises(EngineError):
        shortstack.bench(models[0], engine="vllm", engine_binary=folder, memory=False, **FEW)  # type: ignore[attr-defined]


@pytest.mark.fault(90)
def test_an_unsteady_figure_is_flagged(models: list[str], log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from shortstack.benchmark.engines import Sample
    from tests.benchmark.material import CountedEngine

    times = iter([1.0, 1.0, 1.2, 1.0] * 4)
    monkeypatch.setattr(
        CountedEngine, "bench", lambda self, one, *, runs, warmup: [Sample(t := next(times), t / 2, t / 2, 3)] * runs
    )
    result = shortstack.bench(models[0], memory=False, **FEW)  # type: ignore[attr-defined]
    figure = result.results[0].figures["latency_variation"]
    assert figure.note == "unsteady: above 5%"
    assert "%!" in result.to_text()
    assert "repeat it on a quiet machine" in result.to_text()


def test_memory_is_in_the_results_and_in_the_published_layout(
    models: list[str], tmp_path: Path, log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = {
        "seconds": 0.5,
        "gpu": 0.9,
        "gpu_memory": 0.4,
        "gpu_memory_bytes": 3 * 2.0**30,
        "temperature": 61.0,
        "power": 250.0,
    }

    def measured(subject: Any, engine: str, workloads: Any, keep: Any) -> None:
        for one in workloads:
            keep(
                one,
                {"load_peak_bytes": 9, "peak_rss_bytes": 5 << 20, "peak_device_bytes": 7 << 20, "readings": [reading]},
            )

    monkeypatch.setattr(sweep, "measured_memory", measured)
    out = tmp_path / "b.json"
    shortstack.bench(*models, batch="2", out=out, csv=tmp_path / "csv", **FEW)  # type: ignore[attr-defined]
    one = load_results(out).results[0]
    assert (one.peak_rss_bytes, one.peak_device_bytes) == (5 << 20, 7 << 20)
    assert one.figures["gpu"].value == 0.9
    assert one.figures["power_max"].value == 250.0
    assert one.per_item["readings"] == [reading]
    folder = tmp_path / "csv/dense/batch_gen_out4_bs2"
    rows = {path.name: list(csv.reader(path.read_text().splitlines())) for path in folder.iterdir()}
    times = rows["latency_throughput.csv"]
    assert ",".join(times[0]) == (
        "time_mean(sec),time_std,th_mean(tokens/s),th_std,mem,out_len,in_len,nbatches,batchsz,nparam"
    )
    assert times[1][5:] == ["4", "8", "3", "2", str(one.parameters)]
    assert [float(value) for value in times[2]] == one.per_item["latency"]
    assert rows["memory_tracemalloc.csv"][1][:4] == ["7", "0.0", "5", "0.0"]
    assert rows["nvidia_smi_gpuutil.csv"] == [
        ["timestamp", "temperature.gpu", "utilization.gpu [%]", "utilization.memory [%]", "memory.used [MiB]"],
        ["0.5", "61", "90", "40", "3072"],
    ]


def test_a_model_whose_process_runs_out_of_memory_is_not_timed(
    models: list[str], log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(subject: Any, engine: str, workloads: Any, keep: Any) -> None:
        for one in workloads:
            keep(one, {memory.NO_MEMORY: "signal 9"} if one.batch == 8 else {"peak_rss_bytes": 1, "readings": []})

    monkeypatch.setattr(sweep, "measured_memory", measured)
    result = shortstack.bench(models[0], batch="1,8", **FEW)  # type: ignore[attr-defined]
    assert [one.figures["latency"].value is None for one in result.results] == [False, True]
    assert not any(entry[1] == 8 for entry in log)


def test_memory_that_cannot_be_measured_is_said(
    models: list[str], log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any) -> None:
        raise EngineError("ended with exit code 1")

    monkeypatch.setattr(sweep, "measured_memory", measured)
    result = shortstack.bench(models[0], **FEW)  # type: ignore[attr-defined]
    assert "peak memory is not known: ended with exit code 1" in result.to_text()
    assert result.results[0].figures["latency"].value is not None


def test_pictures(models: list[str], tmp_path: Path, log: list[Any]) -> None:
    shortstack.bench(*models, memory=False, batch="1,2", compare=True, plot=tmp_path / "plots", **FEW)  # type: ignore[attr-defined]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "transformers-latency.png",
        "transformers-speedup.png",
    ]
    assert (tmp_path / "plots/transformers-speedup.png").read_bytes().startswith(b"\x89PNG")


def test_compiled_gives_the_same_tokens(models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from shortstack.benchmark.engines import open_engine
    from shortstack.benchmark.options import EngineOptions
    from tests.benchmark.material import subject, workload

    monkeypatch.setattr(in_process, "_BACKEND", "eager")  # as it is traced; compiling it takes half a minute
    eager, compiled = (
        open_engine(name, subject(Path(models[0])), EngineOptions()) for name in ("transformers", "compiled")
    )
    prompts = [[3, 4, 5], [9, 8, 7, 6]]
    assert eager.greedy(prompts, 5) == compiled.greedy(prompts, 5)
    for batch in (1, 2, 3):
        (sample,) = compiled.bench(workload(batch, 8, 5), runs=1, warmup=1)
        assert (sample.steps, sample.device_seconds) == (4, None)
    compiled.stop()


def test_end_of_text_is_suppressed_and_sampling_as_published(
    models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    config = in_process._generation_config

    def recorded(*arguments: Any) -> Any:
        seen.append(config(*arguments))
        return seen[-1]

    monkeypatch.setattr(in_process, "_generation_config", recorded)
    result = shortstack.bench(
        models[0], memory=False, preset="shortened-llm", batch="1", new_tokens="6", runs=2, warmup=1, quiet=True
    )  # type: ignore[attr-defined]
    assert (seen[0].do_sample, seen[0].top_k, seen[0].top_p, seen[0].temperature) == (True, 50, 0.95, 1.0)
    assert (seen[0].min_new_tokens, seen[0].max_new_tokens) == (6, 6)
    settings = result.results[0].settings
    assert settings["prompt"] == "the published prompt"
    assert settings["prompt_tokens"] == 1 + len("The Leaning Tower of Pisa is known for")


def test_models_with_different_tokenizers_are_allowed_and_said(
    models: list[str], tmp_path: Path, log: list[Any]
) -> None:
    other = pico.build(tmp_path / "other", "llama", seed=3)
    path = other / "tokenizer.json"
    record = json.loads(path.read_text())
    vocabulary = record["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    path.write_text(json.dumps(record))
    result = shortstack.bench(models[0], str(other), memory=False, **FEW)  # type: ignore[attr-defined]
    assert f"{other}: another tokenizer than {models[0]}" in result.to_text()


def test_a_model_without_tokenizer_can_be_timed(
    tmp_path: Path, log: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bare = pico.build(tmp_path / "bare", "llama", with_tokenizer=False)
    shortstack.bench(str(bare), memory=False, **{**FEW, "quiet": False})  # type: ignore[attr-defined]
    assert "the prompt's tokens are counted up" in capsys.readouterr().err
    with pytest.raises(ShortstackError, match="no tokenizer"):
        shortstack.bench(str(bare), memory=False, **{**FEW, "prompt_tokens": None})  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"new_tokens": "60"}, ["8 prompt tokens and 60 new ones, but 64 positions"]),
        ({"engine": "exllama"}, ["engine", "exllama", "unknown"]),
        ({"batch": "-1"}, ["batch", "-1", "expected whole numbers from 1 up"]),
        ({"draft": "embedded", "engine": "vllm"}, ["drafts are run by transformers"]),
        ({"draft": "embedded", "compare": True}, ["compare", "no effect with", "draft"]),
        ({"draft": "embedded", "batch": "2"}, ["batch", "2", "no effect with", "draft"]),
        (
            {"draft": "embedded", "prompt_tokens": None, "new_tokens": "4,8"},
            ["4,8", "expected one number"],
        ),
        ({"draft_tokens": 3}, ["draft", "3", "no effect without"]),
        ({"compare": True}, ["compare", "there is one model"]),
        ({"runs": 0}, ["runs", "0", "expected at least one run"]),
    ],
)
def test_what_cannot_be_run_is_refused_first(
    options: dict[str, Any], says: list[str], models: list[str], tmp_path: Path, log: list[Any]
) -> None:
    with pytest.raises(ShortstackError) as refused:
        shortstack.bench(models[0], memory=False, **{**FEW, **options})  # type: ignore[attr-defined]
    assert all(words in refused.value.message for words in says)
    assert log == []
    recipe = tmp_path / "r.yaml"
    lines = "".join(
        f"    {name}: {json.dumps(value)}\n" for name, value in {**FEW, **options}.items() if name != "quiet"
    )
    recipe.write_text(f"model: {models[0]}\nsteps:\n  bench:\n    models: $model\n{lines}")
    foreseen = shortstack.run(str(recipe), out=tmp_path / "run", dry_run=True)
    assert isinstance(foreseen, Rehearsal)
    assert any(all(words in problem for words in says) for problem in foreseen.problems)


def test_options_of_engines_that_are_none_of_ours(models: list[str], tmp_path: Path) -> None:
    """They were taken without a word where nothing else runs."""
    with pytest.raises(UsageError, match="engine_binary=.*: no effect with engine='?transformers"):
        shortstack.bench(models[0], engine_binary=tmp_path, memory=False, **FEW)  # type: ignore[attr-defined]


@pytest.mark.parametrize("length", [3, 40_000])
def test_a_prompt_has_as_many_tokens_as_were_requested(length: int) -> None:
    """The text in the package is shorter than the longest prompts: it is repeated."""
    subject: Any = SimpleNamespace(tokenizer=pico.tokenizer())
    assert len(_ids_of_length(subject, length)) == length


def test_usage(models: list[str]) -> None:
    with pytest.raises(UsageError, match="no model given"):
        shortstack.bench()  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="given twice"):
        shortstack.bench(models[0], models[0])  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="expected one MODEL, the dense one, found 2"):
        shortstack.bench(*models, draft=models[1])  # type: ignore[attr-defined]


def test_as_a_step_of_a_recipe(models: list[str], tmp_path: Path, log: list[Any]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {models[0]}\nsteps:\n  prune: {{blocks: 2}}\n  bench: {{models: [$model, $prune], batch: 1, new_tokens: 4, "
        "runs: 3, warmup: 1, memory: false, compare: true, csv: csv}\n  compare: {results: $bench}\n"
    )
    foreseen = shortstack.run(str(recipe), out=tmp_path / "run", dry_run=True)
    assert isinstance(foreseen, Rehearsal)
    assert foreseen.problems == []
    assert "figures of 2 models x 1 configurations" in foreseen.to_text()
    shortstack.run(str(recipe), out=tmp_path / "run", quiet=True)
    assert len(load_results(tmp_path / "run/bench/results.json").results) == 2
    assert (tmp_path / "run/bench/csv").is_dir()
    recipe.write_text(f"model: {models[0]}\nsteps:\n  bench: {{models: $model, engine_binary: /bin/sh}}\n")
    with pytest.raises(ShortstackError, match="engine_binary is not allowed in a recipe"):
        shortstack.run(str(recipe), out=tmp_path / "other", dry_run=True)


def test_the_machine_is_measured_in_the_same_run(models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def counted_machine(*arguments: Any) -> Machine:
        measured.append(arguments)
        return floors.measured_machine(*arguments)

    monkeypatch.setattr(sweep, "measured_machine", counted_machine)
    shortstack.bench(models[0], memory=False, **FEW)  # type: ignore[attr-defined]
    assert len(measured) == 2  # before and after the runs
