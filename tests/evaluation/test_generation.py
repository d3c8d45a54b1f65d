"""Generation quality: draws that depend on seed and prompt alone, figures from the texts, the dense model's judgement."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.errors import ShortstackError, UsageError
from shortstack.evaluation.evaluated_model import Subject, open_subjects
from shortstack.evaluation.generate import Drawing, KeyedDraw, continued
from shortstack.evaluation.generation import evaluate_generation
from shortstack.evaluation.options import EvaluationOptions
from shortstack.evaluation.text_metrics import distinct_n
from shortstack.pruning.prune import prune
from tests import oracle, pico

Built = Callable[..., Path]
QUIET = EvaluationOptions(quiet=True)
PROMPTS = ["a", "some words", "a longer prompt with words"]


def subject(directory: Path, **options: Any) -> Subject:
    return open_subjects("x", [str(directory)], EvaluationOptions(quiet=True, **options), None)[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3", "mistral"])
@pytest.mark.parametrize("drawing", [None, Drawing(7)])
def test_a_text_depends_on_seed_and_prompt_alone(built: Built, family: str, drawing: Drawing | None) -> None:
    directory = built(family)
    prompts = [pico.tokenizer()(text)["input_ids"] for text in PROMPTS]
    together = continued(subject(directory), prompts, new_tokens=12, drawing=drawing)
    alone = continued(subject(directory, batch=1), prompts, new_tokens=12, drawing=drawing)
    assert together == alone
    if drawing is not None:
        assert continued(subject(directory), prompts, new_tokens=12, drawing=Drawing(8)) != together


def test_greedy_is_the_likeliest_token_each_time(built: Built) -> None:
    model, ids = pico.load(built("llama")), pico.tokenizer()("some words")["input_ids"]
    ((tokens, ended),) = continued(subject(built("llama")), [ids], new_tokens=8, drawing=None)
    for number in range(8):
        with torch.no_grad():
            best = int(model(torch.tensor([[*ids, *tokens[:number]]]), use_cache=False).logits[0, -1].argmax())
        if number == len(tokens):
            assert (best, ended) == (2, True)  # the end of text, which is not among the tokens
            break
        assert tokens[number] == best


def test_draws_follow_the_distribution_within_top_k_and_top_p() -> None:
    logits = torch.log(torch.tensor([0.05, 0.4, 0.02, 0.3, 0.23]))
    rows = 4000
    drawing = Drawing(3, top_k=4, top_p=0.9)  # top-k drops token 2; of the others 0.408, 0.306 and 0.235 reach 0.9
    draw = KeyedDraw(drawing, list(range(rows)))
    chosen = draw(torch.zeros(rows, 1), logits.repeat(rows, 1)).argmax(dim=1)
    shares = torch.bincount(chosen, minlength=5) / rows
    assert shares.tolist() == pytest.approx([0, 0.4 / 0.93, 0, 0.3 / 0.93, 0.23 / 0.93], abs=0.03)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    dense = pico.build(folder / "dense", max_position_embeddings=512)
    prune(str(dense), blocks="2", out=folder / "pruned", quiet=True)
    return str(dense), str(folder / "pruned")


def test_figures_come_from_the_texts(pair: tuple[str, str], tmp_path: Path) -> None:
    found = evaluate_generation(*pair, new_tokens=20, probes=3, out=tmp_path / "r.json", options=QUIET)
    records = json.loads((tmp_path / "r.json").read_text())
    for record, result in zip(records, found.results, strict=True):
        assert record["what"] == "generation"
        assert record["settings"]["dense"] == pair[0]
        texts = record["per_item"]["drawn texts"]
        assert len(texts) == len(record["per_item"]["prompts"]) > 30
        assert record["per_item"]["drawn distinct_2"] == result.per_item["drawn distinct_2"]
        assert result.figures["drawn distinct_2"].value == pytest.approx(
            sum(record["per_item"]["drawn distinct_2"]) / len(texts)
        )
        assert 0 <= record["figures"]["arithmetic"]["value"] <= 1
        assert len(record["per_item"]["copying"]) == 3
    assert "greedy ppl_by_dense" in found.to_text()


def test_texts_are_judged_by_the_dense_model(pair: tuple[str, str]) -> None:
    _, pruned = evaluate_generation(*pair, new_tokens=12, probes=0, options=QUIET).results
    rows = subject(Path(pair[1]))
    prompts = json.loads((Path(__file__).parents[2] / "src/shortstack/assets/prompts.json").read_text())
    numbers = pruned.per_item["prompts"]
    ids = [pico.tokenizer()(prompts[number]["text"])["input_ids"] for number in numbers]
    texts = continued(rows, ids, new_tokens=12, drawing=None)
    dense = pico.load(Path(pair[0]))
    for context, (said, _), nll in zip(ids, texts, pruned.per_item["greedy ppl_by_dense"], strict=True):
        if not said:
            assert nll is None
            continue
        with torch.no_grad():
            whole = torch.tensor([[*context, *said]])
            logprobs = dense(whole, use_cache=False).logits[0, :-1].double().log_softmax(-1)
        taken = logprobs.gather(1, whole[0, 1:, None])[len(context) - 1 :]
        assert nll == pytest.approx(-float(taken.mean()), rel=1e-4)
        assert pruned.per_item["greedy distinct_1"][numbers.index(numbers[ids.index(context)])] == distinct_n(said, 1)


def test_prompts_from_a_file_and_what_a_tokenizer_cannot_write(shared: Path, tmp_path: Path) -> None:
    model = str(shared / "data/models/babyllama105")  # 105 characters
    (tmp_path / "p.txt").write_text("Once upon a time\n\nЖил-был\nThe cat sat\n", encoding="utf-8")
    (result,) = evaluate_generation(model, prompts=tmp_path / "p.txt", new_tokens=16, probes=0, options=QUIET).results
    assert result.per_item["prompts"] == [0, 2]
    assert any("1 of 3 prompts skipped" in note for note in result.notes)
    assert result.per_item["greedy texts"][0].startswith("Once upon a time")


def test_dense_of_another_vocabulary_reads_the_text_anew(shared: Path) -> None:
    models = shared / "data/models"
    (result,) = evaluate_generation(
        str(models / "babyllama105"), dense=str(models / "stories260k"), new_tokens=40, probes=0, options=QUIET
    ).results
    values = [value for value in result.per_item["drawn ppl_by_dense"] if value is not None]
    assert values
    assert all(math.isfinite(value) and value > 0 for value in values)


def test_what_cannot_be_asked(built: Built, tmp_path: Path) -> None:
    model = str(built("llama"))
    with pytest.raises(ShortstackError, match="each of the 41 prompts .* 200 new tokens, more than its 64 positions"):
        evaluate_generation(model, new_tokens=200, options=QUIET)
    with pytest.raises(UsageError, match="--new-tokens 0"):
        evaluate_generation(model, new_tokens=0, options=QUIET)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ShortstackError, match="no prompts"):
        evaluate_generation(model, prompts=tmp_path / "empty.txt", options=QUIET)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"words": "b"}\n')
    with pytest.raises(ShortstackError, match=r"bad\.jsonl, line 2: no text"):
        evaluate_generation(model, prompts=tmp_path / "bad.jsonl", options=QUIET)
    with pytest.raises(ShortstackError, match="nowhere"):
        evaluate_generation(model, dense="./nowhere", new_tokens=4, probes=0, options=QUIET)


def test_mean_nll_of_the_oracle_is_what_perplexity_means(built: Built) -> None:
    """The judge's figure and perplexity are one notion: a text judged is a window without its prompt."""
    model = pico.load(built("llama"))
    with torch.no_grad():
        whole = oracle.mean_nll(model, [[1, 5, 6, 7]])
        logits = model(torch.tensor([[1, 5, 6, 7]]), use_cache=False).logits
    from shortstack.evaluation.logprobs import continuation_logprobs

    ((total, _),) = continuation_logprobs(model, [([1], [5, 6, 7])], max_length=None, device=logits.device)
    assert -total / 3 == pytest.approx(float(whole[0]), rel=1e-5)
