"""Measuring from end to end: figures and pairs, turns, pictures, samples, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import shortstack
from shortstack.artifacts.results import load_results
from shortstack.benchmark import floors, sweep
from shortstack.benchmark.bench import _ids_of_length
from shortstack.benchmark.engines import transformers as in_process
from shortstack.benchmark.floors import Machine
from shortstack.cli.app import run
from shortstack.errors import ShortstackError, UsageError
from shortstack.recipes.dry_run import Rehearsal
from tests import pico
from tests.benchmark.engines.fake import calls, programs
from tests.benchmark.material import FEW, by_model, counted


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
    assert any("prompts are random tokens" in note for note in found["dense"].notes)


@pytest.mark.fault(86)
def test_times_stand_where_the_engines_throughput_fails(models: list[str], tmp_path: Path) -> None:
    folder = programs(tmp_path / "bin", throughput="rubbish")
    (one,) = shortstack.bench(models[0], engine="vllm", engine_binary=folder, memory=False, **FEW).results  # type: ignore[attr-defined]
    assert one.figures["latency"].value == pytest.approx(0.9)
    assert "served_rate" not in one.figures
    assert any(note.startswith("served_rate is not known: vllm bench throughput: its JSON") for note in one.notes)


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


def test_pictures(models: list[str], tmp_path: Path, log: list[Any]) -> None:
    shortstack.bench(*models, memory=False, batch="1,2", compare=True, plot=tmp_path / "plots", **FEW)  # type: ignore[attr-defined]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "transformers-latency.png",
        "transformers-speedup.png",
    ]
    assert (tmp_path / "plots/transformers-speedup.png").read_bytes().startswith(b"\x89PNG")


def test_compiled_gives_the_same_tokens(built: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from shortstack.benchmark.engines import open_engine
    from shortstack.benchmark.options import EngineOptions
    from tests.benchmark.material import subject, workload

    monkeypatch.setattr(in_process, "_BACKEND", "eager")  # as it is traced; compiling it takes half a minute
    model = built("llama", num_hidden_layers=2)
    eager, compiled = (open_engine(name, subject(model), EngineOptions()) for name in ("transformers", "compiled"))
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
    assert f"{other}: the tokenizer is not that of {models[0]}" in result.to_text()


def test_a_model_without_tokenizer_can_be_timed(
    tmp_path: Path, log: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bare = pico.build(tmp_path / "bare", "llama", with_tokenizer=False)
    shortstack.bench(str(bare), memory=False, **{**FEW, "quiet": False})  # type: ignore[attr-defined]
    assert "the prompt is the token ids 0, 1, 2, ..." in capsys.readouterr().err
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
