"""A sweep: what does not fit, what was interrupted, engines that fail, and memory in a process of its own."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

import shortstack
from shortstack.artifacts.results import load_results
from shortstack.benchmark import memory, sweep
from shortstack.benchmark.engines import EngineError
from shortstack.benchmark.engines import transformers as in_process
from shortstack.errors import ShortstackError
from tests.benchmark.engines.fake import programs
from tests.benchmark.material import FEW, by_model, counted


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
    resumed.clear()
    with pytest.raises(KeyboardInterrupt):
        shortstack.bench(*models, memory=False, batch="1,2", **FEW)  # type: ignore[attr-defined]
    assert 1 in {entry[1] for entry in log}  # a sweep that ended is measured again
    log.clear()
    shortstack.bench(*models, memory=False, batch="1", **FEW)  # type: ignore[attr-defined]
    assert 1 not in {entry[1] for entry in log}  # a part of what was interrupted resumes, too
    log.clear()
    resumed.append(True)
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
    assert "vllm was skipped: vllm bench latency: ended with exit code 3" in result.to_text()
    with pytest.raises(EngineError):
        shortstack.bench(models[0], engine="vllm", engine_binary=folder, memory=False, **FEW)  # type: ignore[attr-defined]


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
