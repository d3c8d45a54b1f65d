"""Several processes: DDP and FSDP2 train as one process does, and resume after a kill."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shortstack.families.open_model import open_checkpoint
from tests.kills import Warm
from tests.retraining.processes import finished, fsdp2_environment, killed_after, launched, losses

STEPS = 10


def command(way: str, model: Path, data: Path, out: Path, *more: str) -> list[str]:
    """Without dropout: masks are drawn in each process for itself."""
    own = ["--cutoff", "400", "--dropout", "0"] if way == "lora" else ["--seq-len", "32", "--validation", "4"]
    common = ["--batch", "4", "--micro-batch", "1", "--lr", "1e-3", "--log-every", "1", "--max-steps", str(STEPS)]
    return ["retrain", way, str(model), "--data", str(data), "--out", str(out), *own, *common, *more]


SLOW = pytest.mark.slow


@SLOW
def test_two_processes_heal_blocks_as_one(pruned: Path, dense: Path, text: Path, tmp_path: Path) -> None:
    """Each has its own windows and their states; gradients are added up, and one process writes."""
    arguments = [
        "retrain", "local", str(pruned), "--of", str(dense), "--data", str(text), "--tokens", "1K", "--seq-len", "32",
        "--radius", "1", "--batch", "4", "--micro-batch", "1", "--lr", "1e-3", "--log-every", "1", "--validation", "8",
        "--states", "disk",
    ]  # fmt: skip
    alone, together = tmp_path / "alone", tmp_path / "together"
    finished(launched("plain", 1, [*arguments, "--out", str(alone)], tmp_path))
    said = finished(launched("ddp", 2, [*arguments, "--out", str(together)], tmp_path))
    assert said.count("step 3/16") == 1, "one process speaks"
    assert len(losses(alone)) == 16
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    first, second = (load_file(out / "model.safetensors") for out in (alone, together))
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)


@pytest.mark.parametrize(
    ("way", "kind"),
    [("lora", "ddp"), *(pytest.param(*p, marks=SLOW) for p in (("cpt", "fsdp2"), ("lora", "fsdp2"), ("cpt", "ddp")))],
)
def test_two_processes_train_as_one(
    way: str, kind: str, pruned: Path, rows: Path, text: Path, warm: Warm, tmp_path: Path
) -> None:
    """The same rows in every step, sums over predicted tokens: the same losses at the same global batch."""
    data = rows if way == "lora" else text
    alone, together, log = tmp_path / "alone", tmp_path / "together", tmp_path / "log.txt"
    assert warm.run(command(way, pruned, data, alone), log)["code"] == 0, log.read_text()
    said = finished(launched(kind, 2, command(way, pruned, data, together), tmp_path))
    assert said.count(f"step 3/{STEPS}") == 1, "one process speaks"
    assert len(losses(alone)) == STEPS
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
    step = json.loads((together / "shortstack.json").read_text())["steps"][-1]
    assert step["parallelism"] == {"ddp": "DDP", "fsdp2": "FSDP2"}[kind]
    first, second = (load_file(out / "model.safetensors") for out in (alone, together))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)
    assert open_checkpoint(together).depth == 4


@pytest.mark.slow
def test_fsdp2_goes_on_with_another_number_of_processes(pruned: Path, text: Path, tmp_path: Path) -> None:
    """A kill, then four processes for two: refused by name, resumed when requested, as one run would have gone."""
    alone, out = tmp_path / "alone", tmp_path / "out"
    finished(launched("plain", 1, command("cpt", pruned, text, alone), tmp_path))
    arguments = command("cpt", pruned, text, out, "--save-every", "4")
    sign = tmp_path / ".out.shortstack-work/checkpoints/checkpoint-4/complete.json"
    killed_after(launched("fsdp2", 2, arguments, tmp_path), sign)
    refused = launched("fsdp2", 4, arguments, tmp_path)
    said, _ = refused.communicate(timeout=240)
    assert refused.returncode != 0
    assert "world size was 2, now 4" in said
    assert "Traceback" not in said.replace('Traceback (most recent call last):\n  File "<frozen runpy>"', "")
    said = finished(launched("fsdp2", 4, [*arguments, "--force"], tmp_path))
    assert "resuming from step" in said
    assert losses(out) == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=SLOW), "fsdp2"])
def test_two_forked_processes_resume_after_a_kill(
    kind: str, pruned: Path, rows: Path, warm: Warm, tmp_path: Path
) -> None:
    """As the next one, in processes that have everything imported, with the environment that the launchers give them."""
    environment = fsdp2_environment(tmp_path) if kind == "fsdp2" else {}
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log.txt"
    sign = tmp_path / ".out.shortstack-work/checkpoints/checkpoint-4/complete.json"
    arguments, same = (command("lora", pruned, rows, path, "--save-every", "4") for path in (out, whole))

    def code(words: list[str], sign: Path | None = None) -> int:
        return int(warm.run(words, log, processes=2, environment=environment, sign=sign)["code"])

    assert code(same) == 0, log.read_text()
    assert code(arguments, sign) == -signal.SIGKILL, log.read_text()
    assert code(arguments) == 0, log.read_text()
    assert "resuming from step" in log.read_text()
    step = json.loads((out / "shortstack.json").read_text())["steps"][-1]
    assert step["parallelism"] == {"ddp": "DDP", "fsdp2": "FSDP2"}[kind]
    assert losses(out) == losses(whole)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@SLOW
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_go_on_after_a_kill(kind: str, pruned: Path, rows: Path, tmp_path: Path) -> None:
    """The same losses and weights as without the kill, to the bit."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    finished(launched(kind, 2, command("lora", pruned, rows, whole, "--save-every", "4"), tmp_path))
    arguments = command("lora", pruned, rows, out, "--save-every", "4")
    killed_after(
        launched(kind, 2, arguments, tmp_path), tmp_path / ".out.shortstack-work/checkpoints/checkpoint-4/complete.json"
    )
    assert "resuming from step" in finished(launched(kind, 2, arguments, tmp_path))
    assert losses(out) == losses(whole)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
