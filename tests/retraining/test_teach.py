"""A teacher's notes: as good as the teacher, complete, and checked before they are learned from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shortstack.errors import ShortstackError, UsageError
from shortstack.retraining import teach as teaching
from shortstack.retraining.losses import full_kl
from shortstack.retraining.teach import teach
from shortstack.retraining.teacher_cache import cached_batch, open_teacher_cache
from tests import pico
from tests.kills import hashes, recorded_hashes
from tests.retraining.test_resume import figures

Retrained = Callable[..., Any]


def test_what_is_written_is_what_the_teacher_says(teacher_cache: Path, dense: Path) -> None:
    rows = open_teacher_cache(teacher_cache).rows("train")
    batch = cached_batch(rows[:3])
    model = pico.load(dense)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    expected = logits.log_softmax(dim=-1).topk(16, dim=-1)
    chosen = batch["targets"] != -100
    assert torch.equal(batch["top_ids"][chosen].long(), expected.indices[chosen])
    assert torch.allclose(batch["top_logprobs"][chosen].float(), expected.values[chosen], atol=0.01)
    assert torch.equal(batch["targets"][:, :-1][chosen[:, :-1]], batch["input_ids"][:, 1:][chosen[:, :-1]])


def test_learning_from_all_tokens_notes_is_learning_from_the_teacher(
    dense: Path, text: Path, retrained: Retrained, tmp_path: Path
) -> None:
    """Rounded to half precision; the order of windows differs, so that the first step's batch is a whole epoch."""
    notes = tmp_path / "notes"
    teach(str(dense), data=str(text), out=notes, top_k=260, seq_len=32, validation=4, quiet=True)
    rows = len(open_teacher_cache(notes).rows("train"))
    common = {"max_steps": 1, "batch": rows, "micro_batch": 1, "loss_weight": 0.0, "lr": 1e-3}
    retrained("offline", tmp_path / "offline", offline=notes, **common)
    model, teacher = pico.load(tmp_path / "offline"), pico.load(dense)
    online = figures(tmp_path / "offline")[0]
    found = expected = 0.0
    start = pico.load(Path(json.loads((tmp_path / "offline/shortstack.json").read_text())["steps"][-1]["source"]))
    with torch.no_grad():
        for row in open_teacher_cache(notes).rows("train"):
            batch = cached_batch([row])
            chosen = batch["targets"] != -100
            given = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
            expected += float(full_kl(start(**given).logits[chosen], teacher(**given).logits[chosen], temperature=1.0))
            found += int(chosen.sum())
    assert online["kl"] == pytest.approx(expected / found, rel=2e-3)
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)


def test_notes_are_small(teacher_cache: Path) -> None:
    record = json.loads((teacher_cache / "shortstack.json").read_text())
    nbytes = sum(shard["bytes"] for shard in record["shards"].values())
    predicted = sum(shard["predicted"] for shard in record["shards"].values())
    assert nbytes < predicted * 16 * 4  # an id and half a float of each of the 16 top tokens, before compression


def test_cut_off_it_goes_on_and_ends_the_same(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(teaching, "_ROWS_PER_SHARD", 8)
    given: dict[str, Any] = {"data": str(text), "top_k": 8, "seq_len": 32, "validation": 12}
    teach(str(dense), out=tmp_path / "whole", quiet=True, **given)
    real = teaching._TeacherRun._save
    for shards in (1, 3, 5):  # within what is held out, and within what is trained on
        out = tmp_path / f"cut-{shards}"
        calls = [0]

        def cut_off(self: Any, *arguments: Any, calls: list[int] = calls, shards: int = shards) -> None:
            real(self, *arguments)
            calls[0] += 1
            if calls[0] == shards:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(teaching._TeacherRun, "_save", cut_off)
            with pytest.raises(KeyboardInterrupt):
                teach(str(dense), out=out, quiet=True, **given)
        assert not out.exists()
        teach(str(dense), out=out, **given)
        assert f"resuming after {shards} shards" in capsys.readouterr().err
        ours, expected = open_teacher_cache(out), open_teacher_cache(tmp_path / "whole")
        for part in ("train", "held_out"):
            for mine, theirs in zip(ours.rows(part), expected.rows(part), strict=True):
                assert all(np.array_equal(mine[key], theirs[key]) for key in theirs)
        assert not list(tmp_path.glob(".*work*"))


@pytest.mark.fault(107)
def test_every_shard_is_hashed_and_the_hash_compared(teacher_cache: Path, tmp_path: Path) -> None:
    assert recorded_hashes(teacher_cache)
    changed = tmp_path / "changed"
    shutil.copytree(teacher_cache, changed)
    record = json.loads((changed / "shortstack.json").read_text())
    record["shards"]["train-00000.npz"]["sha256"] = "0" * 64
    (changed / "shortstack.json").write_text(json.dumps(record))
    with pytest.raises(ShortstackError, match=r"train-00000\.npz: is not the shard that shortstack\.json records"):
        _ = open_teacher_cache(changed).rows("train")[0]


@pytest.mark.fault(107)
def test_a_shard_that_was_changed_is_refused(dense: Path, text: Path, retrained: Retrained, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    teach(str(dense), data=str(text), out=notes, top_k=8, seq_len=32, validation=4, tokens="2000", quiet=True)
    shard = next(notes.glob("train-*.npz"))
    whole = shard.read_bytes()
    for broken, says in ((whole[:-10], "is missing or incomplete"), (b"\0" * len(whole), "cannot be read")):
        shard.write_bytes(broken)
        with pytest.raises(ShortstackError, match=says):
            retrained("offline", tmp_path / "out", offline=notes)
    shard.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with pytest.raises(ShortstackError, match=r"is not the shard that shortstack\.json records|cannot be read"):
        retrained("offline", tmp_path / "out", offline=notes)
    shard.unlink()
    with pytest.raises(ShortstackError, match="is missing or incomplete"):
        retrained("offline", tmp_path / "out", offline=notes)
    with pytest.raises(ShortstackError, match="was not written by shortstack teach"):
        retrained("offline", tmp_path / "out", offline=tmp_path)


def test_requests_that_do_not_go_together(retrained: Retrained, built: Callable[..., Path], tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("offline", {"teacher": "embedded"}, "cannot be combined with --teacher, --data or --hidden-weight"),
        ("offline", {"hidden_weight": 0.1}, "cannot be combined with --teacher, --data or --hidden-weight"),
        ("offline", {"temperature": 2.0}, "--temperature 2.0: .* was made with temperature 1.0"),
        ("distill", {"data": None}, "nothing to train on"),
        ("distill", {"kl_weight": -1.0}, "expected none below 0"),
        (
            "distill",
            {"kl_weight": 0.0, "loss_weight": 0.0, "hidden_weight": 0.0},
            "expected none below 0, and one above",
        ),
        ("distill", {"teacher": str(built("llama", vocab_size=300))}, "has 260 tokens, the teacher .* 300"),
    ]
    for way, changed, says in cases:
        with pytest.raises((UsageError, ShortstackError), match=says):
            retrained(way, tmp_path / "out", **changed)
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_is_not_the_original_has_no_map(
    retrained: Retrained, dense: Path, pruned: Path, tmp_path: Path
) -> None:
    with pytest.raises(ShortstackError, match="its blocks are not all in"):
        retrained("distill", tmp_path / "out", model=dense, teacher=str(pruned))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"top_k": 0}, "--top-k 0: expected at least 1"),
        ({"temperature": 0.0}, "--temperature 0.0: expected a number above 0"),
        ({"temperature": float("inf")}, "--temperature inf: expected"),
        ({"micro_batch": 0}, "--micro-batch 0: expected at least 1"),
        ({"validation": -1}, "--validation -1: expected at least 0"),
        ({"seq_len": 1}, "--seq-len 1: expected at least 2"),
    ],
    ids=str,
)
def test_amounts_that_make_no_sense(given: dict[str, Any], says: str, dense: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        teach(str(dense), data=str(text), out=tmp_path / "o", quiet=True, **given)


def test_the_same_notes_twice(dense: Path, rows: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        teach(str(dense), data=str(rows), out=tmp_path / name, top_k=8, seq_len=400, quiet=True)
    shards = [{n: h for n, h in hashes(tmp_path / name).items() if n.endswith(".npz")} for name in ("a", "b")]
    assert shards[0] == shards[1] != {}
