"""What a disk, a download or another tool does to a checkpoint or to texts, and what must happen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shortstack.cli.app import run
from shortstack.data.sources import read_corpus
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_checkpoint
from shortstack.inspection.info import info
from shortstack.pruning.prune import prune
from shortstack.scoring.score import score
from tests import pico

Built = Callable[..., Path]


@pytest.mark.fault(12)
@pytest.mark.parametrize("what", ["model.safetensors", "tokenizer.json", "config.json"])
def test_links_that_leave_the_checkpoint(copied: Built, tmp_path: Path, what: str) -> None:
    model = copied("llama")
    (model / what).rename(tmp_path / "elsewhere")
    (model / what).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ShortstackError, match=f"{what}: is a link to .*outside the checkpoint"):
        prune(str(model), out=tmp_path / "p", blocks="1", quiet=True)
    assert not (tmp_path / "p").exists()
    prune(str(model), out=tmp_path / "p", blocks="1", allow_links=True, quiet=True)
    assert not (tmp_path / "p" / what).is_symlink()


@pytest.mark.fault(12)
def test_links_within_the_checkpoint(copied: Built, tmp_path: Path) -> None:
    model = copied("llama")
    (model / "model.safetensors").rename(model / "weights")
    (model / "model.safetensors").symlink_to("weights")
    assert open_checkpoint(model).depth == 6


@pytest.mark.fault(12)
def test_a_link_into_another_repository_of_the_hub_cache(copied: Built, tmp_path: Path) -> None:
    """Only the blobs of its own repository are what the hub put there."""
    model = copied("llama")
    snapshot = tmp_path / "models--org--name/snapshots/abc"
    blobs = tmp_path / "models--org--other/blobs"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    (snapshot / "model.safetensors").rename(blobs / "x")
    (snapshot / "model.safetensors").symlink_to(blobs / "x")
    with pytest.raises(ShortstackError, match="outside the checkpoint"):
        open_checkpoint(snapshot)


@pytest.mark.fault(17)
def test_a_stale_shard_is_named_and_not_copied(
    copied: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copied("llama", shard_bytes=40_000)
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(2)}, model / "model-00009-of-00009.safetensors")
    prune(str(model), out=tmp_path / "p", blocks="1")
    assert "model-00009-of-00009.safetensors is not in the index and is ignored" in capsys.readouterr().err
    assert not (tmp_path / "p/model-00009-of-00009.safetensors").exists()


@pytest.mark.fault(9)
def test_zero_size_tensors_are_copied(copied: Built, tmp_path: Path) -> None:
    model = copied("llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.empty"] = torch.empty(0, 4)
    tensors["model.layers.2.empty"] = torch.empty(0, 4)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    prune(str(model), out=tmp_path / "p", blocks="1", quiet=True)
    assert load_file(tmp_path / "p/model.safetensors")["model.layers.1.empty"].shape == (0, 4)


@pytest.mark.fault(28)
def test_mixed_types_are_kept_and_shown(copied: Built, tmp_path: Path) -> None:
    model = copied("llama")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert set(info(str(model)).dtypes) == {"F32", "BF16"}
    prune(str(model), out=tmp_path / "p", blocks="1", verify=True, quiet=True)
    assert load_file(tmp_path / "p/model.safetensors")["model.layers.1.mlp.up_proj.weight"].dtype == torch.bfloat16


@pytest.mark.fault(33)
def test_a_config_of_a_gigabyte_is_not_read(copied: Built) -> None:
    model = copied("llama")
    with (model / "config.json").open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(ShortstackError, match="a config has at most"):
        open_checkpoint(model)


@pytest.mark.fault(38)
def test_without_a_tokenizer(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(built("llama", with_tokenizer=False))
    text = tmp_path / "text.txt"
    text.write_text("some text " * 50)
    capsys.readouterr()
    assert run(["prune", model, "--blocks", "1", "--out", str(tmp_path / "p"), "--quiet"]) == 0
    for arguments in (
        ["score", model, "--data", str(text)],
        ["eval", "ppl", model, "--data", str(text)],
        ["eval", "samples", model],
    ):
        assert run(arguments) == 1
        shown = capsys.readouterr().err
        assert "no tokenizer in the directory" in shown
        assert len(shown[shown.index("error: ") :].splitlines()) == 2


@pytest.mark.fault(42)
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xef\xbb\xbfwith a mark", "with a mark"),
        (b"two\r\nlines", "two\nlines"),
        (b"a\x00b", "a\x00b"),
    ],
)
def test_marks_line_ends_and_nul(tmp_path: Path, data: bytes, expected: str) -> None:
    (tmp_path / "x.txt").write_bytes(data)
    assert read_corpus(str(tmp_path / "x.txt"), role="calibration").documents == [expected]


@pytest.mark.fault(42)
def test_where_a_row_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ShortstackError, match="not UTF-8 at byte 24"):
        read_corpus(str(tmp_path / "x.jsonl"), role="calibration")


@pytest.mark.fault(44)
def test_a_text_of_50_gigabytes_in_one_line(built: Built, tmp_path: Path) -> None:
    """Read up to a budget, whatever the size: a sparse file whose beginning is text."""
    path = tmp_path / "huge.txt"
    with path.open("wb") as stream:
        stream.write(b"some words without a line end " * 2000)
        stream.truncate(50 << 30)
    corpus = read_corpus(str(path), role="calibration", limit_bytes=50_000)
    assert len(corpus.documents[0]) == 50_000
    assert corpus.described()["detail"] == "the first 50000 bytes"


@pytest.mark.fault(44)
def test_the_budget_ends_between_characters_and_rows(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("ä" * 100)
    assert read_corpus(str(tmp_path / "x.txt"), role="calibration", limit_bytes=33).documents == ["ä" * 16]
    (tmp_path / "x.jsonl").write_text('{"text": "abc"}\n' * 100)
    assert len(read_corpus(str(tmp_path / "x.jsonl"), role="calibration", limit_bytes=40).documents) == 3


@pytest.mark.fault(44)
def test_a_row_of_50_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shortstack.data.json_rows.LONGEST_ROW", 1000)
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "a" * 5000}))
    with pytest.raises(ShortstackError, match="line 1: longer than"):
        read_corpus(str(tmp_path / "x.jsonl"), role="calibration")


@pytest.mark.fault(47)
def test_all_but_one_block(built: Built, tmp_path: Path) -> None:
    prune(str(built("llama")), out=tmp_path / "p", blocks="0-3,5", verify=True, quiet=True)
    assert open_checkpoint(tmp_path / "p").original_blocks == (4,)
    with torch.no_grad():
        assert torch.isfinite(pico.load(tmp_path / "p")(torch.tensor([[1, 5, 9]])).logits).all()


@pytest.mark.fault(63)
@pytest.mark.parametrize("times", [1, 3, 152])
def test_out_of_memory_halves_what_is_run_at_a_time(
    built: Built, monkeypatch: pytest.MonkeyPatch, times: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a GPU raises, raised here: down to one window, then block by block, then a clear error."""
    from shortstack.engine.block_model import Skeleton

    windows = tmp_path / "w.jsonl"
    windows.write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in pico.windows(40, 32)))
    options: dict[str, Any] = {"data": str(windows), "samples": 40, "criterion": "ppl,taylor"}
    expected = score(str(built("llama")), quiet=True, **options)
    real, left, sizes = Skeleton.run_block, [times], []

    def run_block(self: Any, block: Any, hidden: torch.Tensor, call: Any) -> torch.Tensor:
        sizes.append(hidden.shape[0] * hidden.shape[1])
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(self, block, hidden, call)

    monkeypatch.setattr(Skeleton, "run_block", run_block)
    found = score(str(built("llama")), **options)
    said = capsys.readouterr().err
    assert "out of memory on cpu: continuing with 640 tokens at a time" in said
    every = 4 + 8 + 20 + 3 * 40  # batches of 10, 5, 2 windows, three times one: then it starts again, block by block
    assert ("out of memory on cpu: trying again block by block" in said) == (times == every)
    assert min(sizes) < sizes[0]
    assert found.settings["memory"] == ("streamed" if times == every else "resident")
    for name in ("ppl", "taylor"):
        assert found.criteria[name].scores == pytest.approx(expected.criteria[name].scores, rel=1e-5)


@pytest.mark.fault(63)
def test_no_memory_for_one_window(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    from shortstack.engine.block_model import Skeleton

    def run_block(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Skeleton, "run_block", run_block)
    with pytest.raises(ShortstackError, match="out of memory on cpu, even with one window and one block at a time"):
        score(str(built("llama")), samples=2, seq_len=16, quiet=True)


@pytest.mark.fault(64)
def test_activations_that_overflow_in_half_precision(copied: Built) -> None:
    model = copied("llama", dtype=torch.float32)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"] *= 1e6
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ShortstackError, match="score of block 0 is not finite") as caught:
        score(str(model), samples=2, seq_len=16, dtype="float16", quiet=True)
    assert "--dtype float32 or bfloat16" in caught.value.hint


@pytest.mark.fault(78)
@pytest.mark.parametrize(
    "name", ["new\nline", "-leading", "e\u0301 decomposed", "x" * 200, "spaces and 'quotes'", "$(touch x)"]
)
def test_odd_names_of_folders(copied: Built, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = copied("llama")
    given = model.rename(tmp_path / name)
    out = tmp_path / f"{name} out"
    prune(str(given), out=out, blocks="1", verify=True, quiet=True)
    assert open_checkpoint(out).depth == 5
    assert run(["info", str(given)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, f"{name} out"])
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.fault(79)
def test_csv_holds_no_formula(built: Built, tmp_path: Path) -> None:
    import csv

    score(
        str(built("llama")), samples=2, seq_len=16, criterion="ppl,taylor,magnitude", csv=tmp_path / "csv", quiet=True
    )
    files = list((tmp_path / "csv").rglob("*.csv"))
    assert (
        len(files) == 1 + 2 + 6 + 2 * 5
    )  # ppl: the order, all blocks twice, each block; the others: the order and four
    for path in files:
        for row in csv.reader(path.read_text().splitlines()):
            for cell in row:
                assert not cell.startswith(("=", "+", "-", "@")) or float(cell) is not None


@pytest.mark.fault(88)
def test_an_extra_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="reading parquet needs pyarrow") as caught:
        read_corpus(str(tmp_path / "x.parquet"), role="calibration")
    assert caught.value.hint == "pip install 'shortstack[parquet]'"


@pytest.mark.fault(89)
def test_durations_come_from_a_clock_that_never_jumps() -> None:
    import ast

    import shortstack

    for path in Path(shortstack.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time":
                assert node.attr in ("perf_counter", "monotonic", "process_time", "strftime"), f"{path}:{node.lineno}"


@pytest.mark.fault(91)
def test_the_same_scores_whatever_the_hash_seed(built: Built, tmp_path: Path) -> None:
    """In a process with one, and in this one, which has another."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    command = [
        "score",
        str(built("llama")),
        "--samples",
        "3",
        "--seq-len",
        "16",
        "--criterion",
        "ppl,taylor",
        "--quiet",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "shortstack", *command, "--out", str(tmp_path / "one.json")],
        capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert run([*command, "--out", str(tmp_path / "two.json")]) == 0
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert (one["criteria"], one["calibration"]) == (two["criteria"], two["calibration"])


@pytest.mark.fault(94)
def test_800_gigabytes_in_191_shards(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Headers alone: sparse files of a 405B model's size are opened, fingerprinted and planned in little memory."""
    from tests.test_promises import peak

    made = tmp_path_factory.mktemp("plan") / "plan.json"

    blocks, shards = 126, 191
    per_block = 6_300_000_000
    entries: list[tuple[str, int]] = [
        ("model.embed_tokens.weight", 128 * 16),
        ("lm_head.weight", 128 * 16),
        ("model.norm.weight", 16),
    ]
    entries += [(f"model.layers.{i}.mlp.up_proj.weight", per_block // 2) for i in range(blocks)]
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        chosen = entries[shard::shards] if shard < len(entries) else []
        header: dict[str, Any] = {}
        position = 0
        for tensor, numel in chosen or [(f"model.layers.0.filler_{shard}", 8)]:
            shape = [128, 16] if numel == 128 * 16 else [numel]
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + 2 * numel]}
            position += 2 * numel
            weight_map[tensor] = name
        raw = json.dumps(header).encode()
        with (tmp_path / name).open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            stream.truncate(8 + len(raw) + position)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "llama", "num_hidden_layers": blocks, "vocab_size": 128, "hidden_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    total = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert total > 790e9
    used = peak(
        sys.executable,
        "-m",
        "shortstack",
        "plan",
        str(tmp_path),
        "--blocks",
        "3,7-90",
        "--out",
        str(made),
    )
    assert used < 200_000_000
    assert json.loads(made.read_text())["after"]["bytes"] < total / 2
