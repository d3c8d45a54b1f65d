"""Zero-shot scores: against lm-eval itself, against log-likelihoods by hand, offline against online, and through faults."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.errors import ShortstackError, UsageError
from shortstack.evaluation.options import EvaluationOptions
from shortstack.evaluation.task_files import TASKS, local_rows
from shortstack.evaluation.zeroshot import evaluate_zeroshot
from tests import pico
from tests.evaluation import material
from tests.hub_server import serving
from tests.kills import Warm

pytest.importorskip("lm_eval")
Built = Callable[..., Path]
QUIET = EvaluationOptions(quiet=True)
LONG = {"max_position_embeddings": 256}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return material.published(tmp_path_factory.mktemp("rows"))


def loglikelihood(model: Any, context: str, continuation: str) -> float:
    """By hand: log p of each token of the continuation after BOS and the context."""
    tokenizer = pico.tokenizer()
    before, whole = (tokenizer(text)["input_ids"] for text in (context, context + continuation))
    with torch.no_grad():
        logprobs = model(torch.tensor([whole]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[place - 1, whole[place]]) for place in range(len(before), len(whole)))


@pytest.mark.parametrize("batch", ["auto", 1, 3])
def test_scores_from_log_likelihoods_by_hand(
    built: Built, rows: Path, batch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    directory = built("llama", **LONG)
    (result,) = evaluate_zeroshot(
        str(directory), tasks_dir=rows, options=EvaluationOptions(batch=batch, quiet=True)
    ).results
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]
    model, right = pico.load(directory), material.right_choices()
    for task, prompts in material.prompts_by_hand().items():
        plain, normalized = [], []
        for choices, gold in zip(prompts, right[task], strict=True):
            sums = [loglikelihood(model, context, continuation) for context, continuation in choices]
            # The harness divides by the length of the choice itself, without the blank in front of it.
            lengths = [len(continuation) - 1 for _, continuation in choices]
            plain.append(float(max(range(len(sums)), key=lambda n: sums[n]) == gold))
            by_length = [total / length for total, length in zip(sums, lengths, strict=True)]
            normalized.append(float(max(range(len(sums)), key=lambda n: by_length[n]) == gold))
        expected = normalized if TASKS[task].metric == "acc_norm" else plain
        assert result.per_item[f"{task} {TASKS[task].metric}"] == expected, task
        figure = result.figures[f"{task} {TASKS[task].metric}"]
        assert figure.value == pytest.approx(sum(expected) / 4)
        assert figure.n == 4
    published = [result.figures[f"{task} {form.metric}"] for task, form in TASKS.items()]
    assert result.figures["AVE"].value == pytest.approx(sum(figure.value or 0 for figure in published) / 7)
    errors = math.sqrt(sum((figure.stderr or 0) ** 2 for figure in published)) / 7
    assert result.figures["AVE"].stderr == pytest.approx(errors)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("batch", [None, 1, 4])
def test_log_probabilities_of_continuations(built: Built, family: str, batch: int | None) -> None:
    from shortstack.evaluation.logprobs import continuation_logprobs

    model = pico.load(built(family))
    generator = torch.Generator().manual_seed(3)

    def drawn(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 259, (size,), generator=generator).tolist()

    requests = [(drawn(1, 30), drawn(1, 9)) for _ in range(17)]
    requests += [(requests[0][0], [token]) for token in (5, 6)]  # one row serves both
    requests.append((drawn(70, 71), drawn(4, 5)))  # longer than the 64 positions: the left part goes
    found = continuation_logprobs(model, requests, max_length=64, device=torch.device("cpu"), batch=batch)
    for (context, continuation), (total, is_greedy) in zip(requests, found, strict=True):
        fed = [*context, *continuation][-65:]
        with torch.no_grad():
            logits = model(torch.tensor([fed[:-1]]), use_cache=False).logits[0, -len(continuation) :].double()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum()
        assert total == pytest.approx(float(expected), rel=1e-5, abs=1e-5)
        assert is_greedy == (logits.argmax(-1).tolist() == continuation)


@pytest.fixture(scope="module")
def direct(shared: Path) -> dict[str, Any]:
    """lm-eval itself, with its own model class, on 10 rows of each real file."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shortstack.evaluation.harness import load_tasks

    directory = shared / "data/models/stories260k"
    found = {task: local_rows(task, shared / "data/tasks") for task in TASKS}
    tasks = [loaded.task for loaded in load_tasks(list(TASKS), found, None)]
    lm = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(directory), batch_size=16, device="cpu",
    )  # fmt: skip
    results: dict[str, Any] = simple_evaluate(lm, tasks=tasks, limit=10, bootstrap_iters=100)
    return results


@pytest.fixture(scope="module")
def ours(shared: Path) -> Any:
    model = str(shared / "data/models/stories260k")
    options = EvaluationOptions(quiet=True, fresh=True)
    (result,) = evaluate_zeroshot(model, tasks_dir=shared / "data/tasks", limit=10, options=options).results
    return result


@pytest.mark.parametrize("task", TASKS)
def test_scores_equal_calling_lm_eval_directly(direct: dict[str, Any], ours: Any, task: str) -> None:
    for metric in {TASKS[task].metric, "acc"}:
        figure = ours.figures[f"{task} {metric}"]
        assert figure.value == direct["results"][task][f"{metric},none"]
        assert figure.stderr == pytest.approx(direct["results"][task][f"{metric}_stderr,none"])
        samples = sorted(direct["samples"][task], key=lambda sample: sample["doc_id"])
        assert ours.per_item[f"{task} {metric}"] == [float(sample[metric]) for sample in samples]
    assert ours.data["tasks"][task]["sha256"]


_ONLINE = """
import json, sys
from shortstack.evaluation.options import EvaluationOptions
from shortstack.evaluation.zeroshot import evaluate_zeroshot
if __name__ == "__main__":
    (result,) = evaluate_zeroshot(sys.argv[1], options=EvaluationOptions(quiet=True)).results
    print(json.dumps(result.to_json()))
"""
_HUB = {
    "boolq": ("aps/super_glue", "boolq", "validation"), "piqa": ("baber/piqa", None, "validation"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"), "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"), "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "openbookqa": ("allenai/openbookqa", "main", "test"),
}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """The tasks' sets as the hub has them: configurations and splits, in parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    configs: dict[str, list[str]] = {}
    for task, rows in material.hub_rows().items():
        repository, config, evaluated = _HUB[task]
        name = config or "default"
        files = []
        for split in ("train", evaluated):
            path = tmp_path / "hub" / repository / name / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), path)
            files.append(f"  - split: {split}\n    path: {name}/{split}-*")
        configs.setdefault(repository, []).append(f"- config_name: {name}\n  data_files:\n" + "\n".join(files))
    for repository, parts in configs.items():
        text = "---\nconfigs:\n" + "\n".join(parts) + "\n---\n"
        (tmp_path / "hub" / repository / "README.md").write_text(text)
    with serving({f"datasets/{name}": tmp_path / "hub" / name for name in configs}) as (endpoint, _):
        yield endpoint


def test_offline_and_online_scores_are_the_same(built: Built, rows: Path, hub: str, tmp_path: Path) -> None:
    model = str(built("llama", **LONG))
    script = tmp_path / "online.py"
    script.write_text(_ONLINE)
    environment = {
        **os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    done = subprocess.run([sys.executable, script, model], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    online = json.loads(done.stdout.splitlines()[-1])
    (offline,) = evaluate_zeroshot(model, tasks_dir=rows, options=QUIET).results
    assert online["per_item"] == offline.per_item
    assert online["figures"] == offline.to_json()["figures"]
    assert {data["form"] for data in online["data"]["tasks"].values()} == {"hub"}


def test_generic_rows_give_the_same_scores(built: Built, rows: Path, tmp_path: Path) -> None:
    model = str(built("llama", **LONG))
    (published,) = evaluate_zeroshot(model, tasks_dir=rows, options=QUIET).results
    (generic,) = evaluate_zeroshot(model, tasks_dir=material.generic(tmp_path), options=QUIET).results
    assert generic.per_item == published.per_item


def test_several_models_a_limit_and_the_published_table(built: Built, rows: Path, tmp_path: Path) -> None:
    models = [str(built("llama", **LONG)), str(built("llama", seed=1, **LONG))]
    found = evaluate_zeroshot(
        *models, tasks="piqa,arc_challenge", tasks_dir=rows, limit=3, out=tmp_path / "r.json", csv=tmp_path / "csv",
        options=QUIET,
    )  # fmt: skip
    records = json.loads((tmp_path / "r.json").read_text())
    assert [record["model"] for record in records] == models
    assert all(len(record["per_item"]["piqa acc"]) == 3 for record in records)
    tables = sorted((tmp_path / "csv").rglob("*.csv"))
    assert [path.name for path in tables] == ["zeroshot_acc.csv"] * 2
    tasks, metrics, scores = (line.split(",") for line in tables[0].read_text().splitlines())
    assert tasks == ["piqa", "arc_challenge", "AVE"]
    assert metrics == ["acc", "acc_norm", "n/a"]
    assert float(scores[2]) == pytest.approx((float(scores[0]) + float(scores[1])) / 2)
    assert float(scores[0]) == 100 * records[0]["figures"]["piqa acc"]["value"]
    text = found.to_text()
    assert "the first 3 rows of each" in text
    assert models[0] in text


def test_examples_in_the_prompt(built: Built, rows: Path, tmp_path: Path) -> None:
    shutil.copytree(rows, tmp_path / "rows")
    material.lines(
        tmp_path / "rows/boolq/train.jsonl", [{**row, "label": True} for row in material.hub_rows()["boolq"]]
    )
    model = str(built("llama", max_position_embeddings=512))
    none, two = (
        evaluate_zeroshot(model, tasks="boolq", tasks_dir=tmp_path / "rows", num_fewshot=n, options=QUIET).results[0]
        for n in (0, 2)
    )
    assert (none.settings["num_fewshot"], two.settings["num_fewshot"]) == (0, 2)
    assert "training_sha256" not in none.data["tasks"]["boolq"]
    assert two.data["tasks"]["boolq"]["training_sha256"]


@pytest.mark.fault(66)
def test_a_model_of_nan_has_no_accuracy(copied: Built, rows: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = copied("llama", **LONG)
    tensors = load_file(model / "model.safetensors")
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ShortstackError, match="its logits are not finite"):
        evaluate_zeroshot(str(model), tasks="piqa", tasks_dir=rows, options=QUIET)


@pytest.mark.fault(66)
def test_one_embedding_of_nan_names_the_row(copied: Built, rows: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = copied("llama", **LONG)
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][pico.tokenizer()("j")["input_ids"][-1]] = float("nan")  # as in "open a jar"
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ShortstackError, match="piqa, row 1: a log-likelihood is not finite"):
        evaluate_zeroshot(str(model), tasks="piqa", tasks_dir=rows, options=QUIET)


@pytest.mark.fault(39)
def test_ids_beyond_the_embedding_name_the_row(tmp_path: Path, rows: Path) -> None:
    small = pico.build(tmp_path / "small", vocab_size=pico.tokenizer()("w")["input_ids"][-1], **LONG)
    with pytest.raises(ShortstackError, match=r"piqa, row 1: token id \d+, but the embedding of .* has \d+ rows"):
        evaluate_zeroshot(str(small), tasks="piqa", tasks_dir=rows, options=QUIET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "piqa,piqa"}, "each once"),
        ({"tasks": "nosuchtask"}, "no local file format of nosuchtask"),
        ({"limit": 0}, "at least 1 row"),
        ({"tasks_dir": Path("nowhere")}, "no such folder"),
    ],
)
def test_wrong_options(built: Built, rows: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate_zeroshot(str(built("llama")), **{"tasks_dir": rows, **options}, options=QUIET)


@pytest.mark.parametrize("whole_index", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_task_that_the_harness_does_not_know(
    whole_index: bool, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index of thousands of tasks takes seconds; without it the harness knows those of the folder alone."""
    from shortstack.evaluation import harness

    real = harness.TaskManager

    def manager(include_path: str, include_defaults: bool) -> Any:
        return real(include_path=include_path, include_defaults=include_defaults and whole_index)

    monkeypatch.setattr(harness, "TaskManager", manager)
    with pytest.raises(UsageError, match="the harness has no such task"):
        evaluate_zeroshot(str(built("llama")), tasks="nosuchtask", options=QUIET)


def test_a_killed_run_goes_on_with_the_next_task(
    built: Built, warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHORTSTACK_CACHE", str(tmp_path / "kept"))
    rows = material.published(tmp_path / "rows")
    file = rows / "hellaswag/hellaswag_val.jsonl"
    file.write_text(file.read_text() * 100)  # long enough to be killed in
    model = str(built("llama", **LONG))
    command = ["eval", "zeroshot", model, "--tasks-dir", str(rows), "--out", str(tmp_path / "r.json")]
    log, kept = tmp_path / "log.txt", {"SHORTSTACK_CACHE": str(tmp_path / "kept")}
    # boolq and piqa are done then
    assert warm.run(command, log, said="hellaswag ...", environment=kept)["code"] == -signal.SIGKILL, log.read_text()
    assert not (tmp_path / "r.json").exists()
    assert warm.run(command, log, environment=kept)["code"] == 0, log.read_text()
    said = log.read_text()
    found = [line for line in said.splitlines() if "cached by an earlier run" in line]
    assert {line.split(": ")[1] for line in found} >= {"boolq", "piqa"}
    assert f"{model}: openbookqa ..." in said
    (fresh,) = evaluate_zeroshot(model, tasks_dir=rows, options=EvaluationOptions(quiet=True, fresh=True)).results
    assert json.loads((tmp_path / "r.json").read_text())["per_item"] == fresh.per_item


def test_nothing_is_found_for_another_model_or_other_rows(
    built: Built, rows: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHORTSTACK_CACHE", str(tmp_path / "kept"))
    model = Path(shutil.copytree(built("llama", **LONG), tmp_path / "model"))

    def said(folder: Path, **options: Any) -> bool:
        evaluate_zeroshot(str(model), tasks="piqa", tasks_dir=folder, options=EvaluationOptions(**options))
        return "cached by an earlier run" in capfd.readouterr().err

    assert not said(rows)
    assert said(rows)
    assert not said(rows, fresh=True)
    assert not said(rows, dtype="bfloat16")
    other = Path(shutil.copytree(rows, tmp_path / "rows"))
    (other / "piqa/valid-labels.lst").write_text("1\n1\n0\n1\n")
    assert not said(other)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1  # somewhere inside, where a fingerprint need not look
    (model / "model.safetensors").write_bytes(weights)
    assert not said(rows)


def test_the_callers_random_numbers_stay_as_they_were(built: Built, rows: Path) -> None:
    import random

    import numpy as np

    import shortstack.evaluation.harness  # noqa: F401  some libraries draw a number when they are imported

    model = str(built("llama", **LONG))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()  # type: ignore[index]
    evaluate_zeroshot(model, tasks="piqa", tasks_dir=rows, options=EvaluationOptions(quiet=True, fresh=True))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    assert torch.equal(torch.random.get_rng_state(), before[2])
