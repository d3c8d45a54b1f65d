"""Where responses alone count, losses and everything made of them are those of the tokens that count, and no others."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.data.calibration import CalibrationOptions, CalibrationSet, draw_windows
from shortstack.data.sources import read_corpus
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.search import search
from shortstack.scoring.criteria import parse_criteria
from shortstack.scoring.score import score, score_windows
from tests import oracle, pico

Built = Callable[..., Path]

WINDOWS = pico.windows(5, 16)
# Of each window another number of tokens; in the last one the very last alone.
COUNTED = [[place >= start for place in range(16)] for start in (3, 9, 1, 12, 15)]


def naive(model: Any, removed: set[int]) -> list[torch.Tensor]:
    """Log-probabilities at the positions whose next token counts, per window."""
    oracle.bypassed(model, removed)
    found = []
    for window, counted in zip(WINDOWS, COUNTED, strict=True):
        logits = model(torch.tensor([window]), use_cache=False).logits[0].double().log_softmax(dim=-1)
        found.append(logits[[place - 1 for place in range(1, 16) if counted[place]]])
    return found


def nll(found: list[torch.Tensor]) -> torch.Tensor:
    """Of every token that counts."""
    targets = [
        [token for token, counts in zip(w, c, strict=True) if counts] for w, c in zip(WINDOWS, COUNTED, strict=True)
    ]
    return torch.cat([-logs[torch.arange(len(own)), own] for logs, own in zip(found, targets, strict=True)])


@pytest.mark.parametrize("criteria", ["ppl", "ppl,kl,accept"])
def test_losses_equal_the_naive_ones(built: Built, memory: Any, criteria: str) -> None:
    """With logits shown to criteria, and where losses are made in slices of the vocabulary."""
    path = built("llama")
    found = score_windows(
        open_checkpoint(path), CalibrationSet(WINDOWS, {}, counted=COUNTED), parse_criteria(criteria), memory=memory
    )
    with torch.no_grad():
        dense = naive(pico.load(path), set())
        without = [naive(pico.load(path), {block}) for block in range(6)]
    ppl = found.criteria["ppl"]
    assert ppl.dense_ppl == pytest.approx(math.exp(nll(dense).mean()), rel=1e-5)
    assert ppl.scores == pytest.approx([math.exp(nll(one).mean()) for one in without], rel=1e-5)
    if criteria == "ppl":
        return
    p = torch.cat(dense)
    q = [torch.cat(one) for one in without]
    kl = [float((p.exp() * (p - one)).sum(dim=-1).mean()) for one in q]
    assert found.criteria["kl"].scores == pytest.approx(kl, rel=1e-4)
    accept = [float(1 - torch.minimum(p.exp(), one.exp()).sum(dim=-1).mean()) for one in q]
    assert found.criteria["accept"].scores == pytest.approx(accept, rel=1e-4)


def test_the_error_is_that_of_the_mean_over_tokens(built: Built) -> None:
    """By leaving out one window after the other, which needs no formula."""
    path = built("llama")
    found = score_windows(open_checkpoint(path), CalibrationSet(WINDOWS, {}, counted=COUNTED), parse_criteria("ppl"))
    with torch.no_grad():
        change = nll(naive(pico.load(path), {2})) - nll(naive(pico.load(path), set()))
    counts = [sum(one[1:]) for one in COUNTED]
    parts = change.split(counts)
    left_out = torch.stack([torch.cat([*parts[:n], *parts[n + 1 :]]).mean() for n in range(5)])
    jackknife = math.sqrt(4 / 5 * float((left_out - left_out.mean()).square().sum()))
    assert found.criteria["ppl"].stderr is not None
    assert found.criteria["ppl"].stderr[2] == pytest.approx(jackknife, rel=0.6)


@pytest.mark.parametrize("batch", [None, 2])
def test_gradients_equal_those_of_autograd(built: Built, memory: Any, batch: int | None) -> None:
    path = built("llama")
    name = "taylor" if batch is None else f"taylor:batch={batch}"
    found = score_windows(
        open_checkpoint(path), CalibrationSet(WINDOWS, {}, counted=COUNTED), parse_criteria(name), memory=memory
    )
    model = pico.load(path)
    blocks = oracle.layers_of(model)
    size = batch or 5
    salience: dict[tuple[int, str], torch.Tensor] = {}
    counts = [sum(one[1:]) for one in COUNTED]
    for start in range(0, 5, size):
        model.zero_grad()
        part = nll(naive(model, set())).split(counts)[start : start + size]
        torch.cat(part).mean().backward()
        for index, block in enumerate(blocks):
            for key, parameter in oracle.scored(block).items():
                assert parameter.grad is not None
                own = (parameter * parameter.grad).detach()
                salience[index, key] = salience.get((index, key), torch.zeros_like(own)) + own
    for index, tensors in found.criteria[name].tensors.items():
        for key, value in tensors.items():
            assert value == pytest.approx(float(salience[index, key].abs().double().sum()), rel=1e-4, abs=1e-9)


def test_sources_have_their_own_tokens(built: Built) -> None:
    path, names = built("llama"), ("a", "a", "b", "b", "b")
    together = score_windows(
        open_checkpoint(path), CalibrationSet(WINDOWS, {}, names, COUNTED), parse_criteria("ppl,kl,taylor")
    )
    for name, part in (("a", slice(0, 2)), ("b", slice(2, 5))):
        alone = score_windows(
            open_checkpoint(path),
            CalibrationSet(WINDOWS[part], {}, counted=COUNTED[part]),
            parse_criteria("ppl,kl,taylor"),
        )
        for key, one in alone.criteria.items():
            assert together.criteria[key].sources[name].scores == pytest.approx(one.scores, rel=1e-5)


ROWS = [{"question": f"What is {n} plus {n}?", "answer": f"The sum is {2 * n}."} for n in range(1, 60)]


def rows_file(folder: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("sampling", ["documents", "published", "joined"])
@pytest.mark.parametrize("bos_every", [False, True])
def test_rows_of_instructions_count_their_answers(tmp_path: Path, sampling: Any, bos_every: bool) -> None:
    options = CalibrationOptions(samples=6, seq_len=150, sampling=sampling, bos_every=bos_every)
    corpus = read_corpus(rows_file(tmp_path), role="calibration", answered=True)
    drawn = draw_windows(corpus, pico.tokenizer(), options=options)
    assert drawn.record["counted"] == "responses"
    assert drawn.counted is not None
    assert drawn.record["counted_tokens"] == sum(map(sum, drawn.counted))
    for window, counted in zip(drawn.windows, drawn.counted, strict=True):
        assert len(counted) == len(window) == 150
        assert any(counted)
        assert not counted[0]
        text = pico.tokenizer().decode([token for token, counts in zip(window, counted, strict=True) if counts])
        assert set(text) <= set(" The sum is 0123456789.</>")
        assert "Instruction" not in text
    everything = draw_windows(
        corpus, pico.tokenizer(), options=options.__class__(**{**vars(options), "count_prompts": True})
    )
    assert everything.counted is None
    assert everything.windows == drawn.windows
    assert everything.record["counted"] == "all"


def test_chats_count_their_answers(tmp_path: Path) -> None:
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"ask {n} " * 8},
                {"role": "assistant", "content": f"reply {n} " * 8},
            ]
        }
        for n in range(20)
    ]
    corpus = read_corpus(rows_file(tmp_path, chats), role="calibration", answered=True)
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    drawn = draw_windows(corpus, tokenizer, samples=5, seq_len=64, chat_template=True)
    assert drawn.counted is not None
    for window, counted in zip(drawn.windows, drawn.counted, strict=True):
        text = tokenizer.decode([token for token, counts in zip(window, counted, strict=True) if counts])
        assert "ask" not in text
        assert text


def test_the_commands_record_what_counted(built: Built, tmp_path: Path) -> None:
    model, data = str(built("llama", max_position_embeddings=256)), rows_file(tmp_path)
    responses = score(model, data=data, samples=4, seq_len=200)
    everything = score(model, data=data, samples=4, seq_len=200, count_prompts=True)
    assert responses.calibration["counted"] == "responses"
    assert everything.calibration["counted"] == "all"
    assert responses.criterion("ppl").dense_ppl != pytest.approx(everything.criterion("ppl").dense_ppl, rel=1e-3)
    found = search(model, data=data, samples=4, seq_len=200, remove=1, selection="one-shot")
    assert found.why["calibration"]["counted"] == "responses"


def test_a_search_counts_responses(built: Built, tmp_path: Path) -> None:
    """Beside the naive loss of the windows that judge."""
    path, data = built("llama", max_position_embeddings=256), rows_file(tmp_path)
    found = search(str(path), data=data, samples=3, seq_len=200, remove=1, selection="greedy")
    drawn = draw_windows(
        read_corpus(data, role="calibration", answered=True), pico.tokenizer(), samples=6, seq_len=200
    ).some([3, 4, 5])
    assert drawn.counted is not None
    alone = score_windows(open_checkpoint(path), drawn, parse_criteria("ppl")).criterion("ppl")
    [block] = found.removed
    assert found.why["measured"]["dense_ppl"] == pytest.approx(alone.dense_ppl, rel=1e-5)
    assert found.why["measured"]["sets"][0]["ppl"] == pytest.approx(alone.scores[block], rel=1e-5)


def test_text_has_no_prompts(built: Built, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("words " * 200)
    with pytest.raises(ShortstackError, match="no rows of chats or instructions for --count-prompts"):
        score(str(built("llama")), data=str(tmp_path / "t.txt"), seq_len=16, count_prompts=True)
