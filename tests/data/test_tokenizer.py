"""A tokenizer in place of the checkpoint's own: every command that reads text, what it records, and what is no such thing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shortstack
from shortstack.artifacts.results import Result
from shortstack.checkpoint.tokenizer_files import ChosenTokenizer, chosen_tokenizer, is_tokenizer_file
from shortstack.data.tokenizer import load_tokenizer
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_model
from shortstack.recipes.cache_keys import step_key
from shortstack.recipes.resolve import resolve
from tests import pico
from tests.retraining import material

Built = Callable[..., Path]
WINDOWS: dict[str, Any] = {"samples": 2, "seq_len": 16, "quiet": True}


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The other tokenizer's files, beside things that are no tokenizer's."""
    folder = tmp_path / "other"
    pico.tokenizer(backwards=True).save_pretrained(folder)
    (folder / "README.md").write_text("a model's card")
    (folder / "model.safetensors").write_bytes(b"weights that nobody reads")
    return folder


@pytest.fixture
def bare(built: Built, tmp_path: Path) -> Path:
    """A checkpoint without a tokenizer."""
    shutil.copytree(built("llama", max_position_embeddings=512), tmp_path / "bare")
    for path in (tmp_path / "bare").iterdir():
        if is_tokenizer_file(path.name):
            path.unlink()
    return tmp_path / "bare"


@pytest.fixture
def dressed(bare: Path, other: Path, tmp_path: Path) -> Path:
    """The same checkpoint with the other tokenizer as its own."""
    shutil.copytree(bare, tmp_path / "dressed")
    for name, data in ChosenTokenizer("", other).files.items():
        (tmp_path / "dressed" / name).write_bytes(data)
    return tmp_path / "dressed"


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("some words to draw windows from, and a few more of them. " * 20)
    return str(tmp_path / "text.txt")


def record_of(other: Path) -> dict[str, str]:
    return {"source": str(other), "sha256": ChosenTokenizer("", other).sha256}


def test_which_files_are_a_tokenizers() -> None:
    own = [
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
        "merges.txt", "tokenizer.model", "spiece.model", "x.tiktoken", "tekken.json", "chat_template.jinja",
    ]  # fmt: skip
    others = [
        "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "tokenization_x.py",
        "README.md", "token_embeddings.bin", "LICENSE.txt", "preprocessor_config.json",
    ]  # fmt: skip
    assert [name for name in own if not is_tokenizer_file(name)] == []
    assert [name for name in others if is_tokenizer_file(name)] == []


def test_scores_are_those_of_a_checkpoint_that_has_it(
    bare: Path, dressed: Path, other: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ShortstackError, match="no tokenizer in the directory") as error:
        shortstack.score(str(bare), data=text, **WINDOWS)
    assert "tokenizer=DIR names another one" in error.value.hint
    found = shortstack.score(str(bare), data=text, tokenizer=str(other), **WINDOWS)
    own = shortstack.score(str(dressed), data=text, **WINDOWS)
    assert found.criteria == own.criteria
    assert found.calibration["tokenizer"] == record_of(other)
    assert "tokenizer" not in own.calibration
    assert found.calibration["marks"] == own.calibration["marks"]
    wrong = shortstack.score(str(dressed), data=text, tokenizer=str(own_tokenizer(bare.parent)), **WINDOWS)
    assert wrong.criteria != own.criteria, "a checkpoint that has one reads by the other, too"
    capsys.readouterr()
    shortstack.score(str(bare), criterion="magnitude", tokenizer=str(other))
    assert "have no effect" in capsys.readouterr().err


def own_tokenizer(folder: Path) -> Path:
    pico.tokenizer().save_pretrained(folder / "usual")
    return folder / "usual"


@pytest.mark.fault(132)
def test_figures_are_kept_apart_by_tokenizer(
    dressed: Path, bare: Path, other: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing that one tokenizer found is taken for another's, nor for the same folder's once it holds another."""
    chosen, usual = tmp_path / "chosen", own_tokenizer(tmp_path)

    def measured(model: Path, tokenizer: Path | None) -> Result:
        given = {} if tokenizer is None else {"tokenizer": str(tokenizer)}
        (result,) = shortstack.evaluate(str(model), data=text, seq_len="16", **given).results
        return result

    shutil.copytree(other, chosen)
    first = measured(bare, chosen)
    assert first.figures == measured(dressed, None).figures
    assert first.settings["tokenizer_from"] == {**record_of(other), "source": str(chosen)}
    capsys.readouterr()
    assert measured(bare, other).figures == first.figures
    assert "cached by an earlier run" in capsys.readouterr().err, (
        "the same files in another folder are the same tokenizer"
    )
    shutil.rmtree(chosen)
    shutil.copytree(usual, chosen)
    second = measured(bare, chosen)
    assert second.figures != first.figures
    assert second.settings["tokenizer"] != first.settings["tokenizer"]
    assert "cached by an earlier run" not in capsys.readouterr().err


@pytest.mark.parametrize("way", ["samples", "generation", "bench"])
def test_whatever_reads_text_reads_it_by_the_chosen_one(
    way: str, bare: Path, dressed: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shortstack.registry import COMMANDS

    options: dict[str, Any] = {
        "samples": {"prompt": "ab", "new_tokens": 3, "count": 1},
        "generation": {"new_tokens": 4, "probes": 1},
        "bench": {"runs": 2, "warmup": 1, "new_tokens": "2", "memory": False},
    }[way]
    command = COMMANDS["bench" if way == "bench" else f"eval {way}"]
    for model in (bare, dressed):
        given = {"tokenizer": str(other)} if model is bare else {}
        (result,) = command.stage(str(model), fresh=True, quiet=True, **options, **given).results
        assert result.settings.get("tokenizer_from") == (record_of(other) if model is bare else None)
        if model is bare:
            found = result
    if way != "bench":
        assert found.per_item == result.per_item
    assert found.settings.get("prompt_tokens") == result.settings.get("prompt_tokens")


def test_the_demo_writes_by_it(bare: Path, other: Path) -> None:
    from shortstack.demo.options import DemoOptions
    from shortstack.demo.writing import Column

    column = Column("it", str(bare), DemoOptions(tokenizer=str(other), quiet=True).running)
    assert column.subject is not None, column.error
    assert column.subject.tokenizer("ab")["input_ids"] == pico.tokenizer(backwards=True)("ab")["input_ids"]


@pytest.mark.slow
def test_a_retrained_checkpoint_has_the_tokenizer_that_it_was_trained_with(
    built: Built, bare: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shortstack.retraining.run_folder import Session

    rows = material.instructions(tmp_path / "rows.json")
    model = tmp_path / "model"
    shutil.copytree(built("llama", max_position_embeddings=512), model)
    (model / "chat_template.jinja").write_text("of the tokenizer that is wrong")
    settings: dict[str, Any] = {
        "data": str(rows), "out": tmp_path / "out", "max_steps": 2, "save_every": 1, "batch": 4, "micro_batch": 2,
        "cutoff": 400, "merge": True, "eval_data": str(rows.parent / "text.txt"), "quiet": True,
    }  # fmt: skip
    (rows.parent / "text.txt").write_text("a text that is followed while it is trained. " * 30)
    real = Session.complete

    class CutOffError(Exception):
        pass

    def complete(self: Session, checkpoint: Path) -> None:
        real(self, checkpoint)
        raise CutOffError

    with monkeypatch.context() as patch:
        patch.setattr(Session, "complete", complete)
        with pytest.raises(CutOffError):
            shortstack.retrain_lora(str(model), tokenizer=str(other), **settings)
    with pytest.raises(ShortstackError, match="begun with other settings: tokenizer was"):
        shortstack.retrain_lora(str(model), **settings)
    shortstack.retrain_lora(str(model), tokenizer=str(other), **settings)
    out = tmp_path / "out"
    for name, data in ChosenTokenizer("", other).files.items():
        assert (out / name).read_bytes() == data
    assert not (out / "chat_template.jinja").exists()
    assert (out / "README.md").read_text() != (other / "README.md").read_text()
    record = json.loads((out / "shortstack.json").read_text())
    assert record["steps"][-1]["tokenizer"] == record_of(other)
    assert record["files"]["tokenizer.json"]
    ids = load_tokenizer(open_model(str(out)))("ab")["input_ids"]
    assert ids == pico.tokenizer(backwards=True)("ab")["input_ids"] != pico.tokenizer()("ab")["input_ids"]


def test_taught_logits_name_the_tokenizer(bare: Path, other: Path, text: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": text, "top_k": 4, "seq_len": 16, "validation": 2, "quiet": True}
    shortstack.teach(str(bare), tokenizer=str(other), out=tmp_path / "notes", **settings)
    record = json.loads((tmp_path / "notes/shortstack.json").read_text())
    assert record["tokenizer"] == record_of(other)


def test_a_known_fault_of_the_chosen_one_is_repaired(bare: Path, other: Path, tmp_path: Path) -> None:
    """The tokenizer of LLaMA-1 as it was published: its special tokens are empty."""
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "", "eos_token": ""}))
    (other / "config.json").write_text(json.dumps({"vocab_size": 32000, "bos_token_id": 0, "eos_token_id": 1}))
    chosen = chosen_tokenizer(str(other))
    assert chosen is not None
    assert json.loads(chosen.files["tokenizer_config.json"])["bos_token"] == "<s>"
    found = load_tokenizer(open_model(str(bare), tokenizer=str(other)))
    assert (found.bos_token, found.eos_token_id) == ("<s>", 2)


def larger(folder: Path, *, added: bool) -> Path:
    tokenizer = pico.tokenizer()
    if added:
        tokenizer.add_tokens([*(f"<{number}>" for number in range(40)), "<added>"])
        tokenizer.save_pretrained(folder)
        return folder
    tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["zz"] = pico.VOCABULARY + 40
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.fault(132)
def test_more_ids_than_the_embedding_has_rows(bare: Path, text: str, tmp_path: Path) -> None:
    ids, rows = pico.VOCABULARY + 40, open_model(str(bare)).embedding_rows
    with pytest.raises(ShortstackError, match=rf"has ids up to {ids}, but the embedding of .*bare has {rows} rows"):
        shortstack.score(str(bare), data=text, tokenizer=str(larger(tmp_path / "l", added=False)), **WINDOWS)
    added = larger(tmp_path / "a", added=True)
    found = shortstack.score(str(bare), data=text, tokenizer=str(added), **WINDOWS)
    assert found.calibration["tokenizer"]["source"] == str(added), "tokens that no text holds do no harm"
    (tmp_path / "odd.txt").write_text("words with <added> among them. " * 20)
    with pytest.raises(ShortstackError, match="token id .* in the windows, but the embedding has"):
        shortstack.score(str(bare), data=str(tmp_path / "odd.txt"), tokenizer=str(added), **WINDOWS)


@pytest.mark.fault(132)
def test_what_is_no_tokenizer(bare: Path, other: Path, text: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(other, tmp_path / "broken")
    (tmp_path / "broken/tokenizer.json").write_text("{}")
    cases = [
        (tmp_path / "empty", "tokenizer=.*empty.*: no tokenizer in the directory"),
        (tmp_path / "nowhere", "nowhere: no such directory"),
        (other / "tokenizer.json", "is a file, expected a tokenizer's directory or a hub id"),
        (tmp_path / "broken", "tokenizer=.*broken.*: its tokenizer cannot be loaded"),
    ]
    for chosen, says in cases:
        with pytest.raises(ShortstackError, match=says) as error:
            shortstack.score(str(bare), data=text, tokenizer=str(chosen), **WINDOWS)
        assert len(error.value.message.splitlines()) == 1


def test_a_recipe_knows_it_by_its_files(bare: Path, other: Path, tmp_path: Path) -> None:
    """Its path is the recipe's own; another tokenizer makes another step, another file beside it does not."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {bare}\nsteps: {{score: {{data: embedded, tokenizer: other}}}}\n")
    (step,) = resolve(str(recipe)).steps
    assert step.values["tokenizer"] == str(other)

    def identity() -> Any:
        return step_key(step, {"model": "m"})["options"]["tokenizer"]

    before = identity()
    (other / "README.md").write_text("another card")
    assert identity() == before
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 7}))
    assert identity() != before
