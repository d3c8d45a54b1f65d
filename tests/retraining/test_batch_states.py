"""BatchStates of batches of any shape on their way through blocks that come in one at a time: as the whole model has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.retraining.batch_states import BatchModel, BatchStates
from tests import pico

Built = Callable[..., Path]
CPU = torch.device("cpu")


def batches() -> list[dict[str, Any]]:
    """Windows as they are, rows that are padded, documents that are packed."""
    ids_BT = torch.tensor(pico.windows(2, 12))
    padded_BT = torch.tensor([[0] * 4 + [1] * 8, [1] * 12])
    positions_BT = torch.cat([torch.arange(7), torch.arange(5)]).expand(2, -1)
    return [
        {"input_ids": ids_BT},
        {
            "input_ids": ids_BT, "attention_mask": padded_BT,
            "position_ids": (padded_BT.cumsum(dim=1) - 1).clamp(min=0),
        },
        {"input_ids": ids_BT, "position_ids": positions_BT},
        {"input_ids": ids_BT[:1, :9], "attention_mask": torch.ones(1, 9, dtype=torch.long)},
    ]  # fmt: skip


def expected(directory: Path, batch: dict[str, Any], depth: int) -> torch.Tensor:
    """What goes into block `depth` of the whole model, at real tokens."""
    model, found = pico.load(directory), []
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 6)
    blocks[depth].register_forward_pre_hook(
        lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch, use_cache=False)
    return found[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "mixtral"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_states_are_those_of_the_whole_model(family: str, on_disk: bool, built: Built, tmp_path: Path) -> None:
    directory = built(family)
    model = BatchModel(open_checkpoint(directory), dtype=torch.float32, device=CPU)
    given = batches()
    states = model.embedded(given, tmp_path / "states.bin" if on_disk else None)
    model.advance(given, states, [0, 1])
    model.advance(given, states, [2])
    for number, batch in enumerate(given):
        if family == "opt" and "position_ids" in batch:
            continue  # it counts positions itself
        real_BT = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        torch.testing.assert_close(
            states[number][real_BT], expected(directory, batch, 3)[real_BT], rtol=1e-4, atol=1e-4
        )
    states.close()
    model.close()
    assert list(tmp_path.iterdir()) == []


def test_what_two_models_share_is_held_once(built: Built, copied: Built) -> None:
    first = BatchModel(open_checkpoint(built("llama")), dtype=torch.float32, device=CPU)
    own = {name: p.data_ptr() for name, p in first.skeleton._model.named_parameters() if not p.is_meta}
    other = copied("llama")
    weights = pico.load(other).state_dict()
    weights["model.norm.weight"][0] += 1
    from safetensors.torch import save_file

    save_file({name: value.clone() for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    second = BatchModel(open_checkpoint(other), dtype=torch.float32, device=CPU, like=first)
    theirs = {name: p.data_ptr() for name, p in second.skeleton._model.named_parameters() if not p.is_meta}
    assert own.keys() == theirs.keys()
    assert {name for name in own if own[name] != theirs[name]} == {"model.norm.weight"}
    assert float(second.skeleton._model.get_parameter("model.norm.weight")[0]) == pytest.approx(
        float(weights["model.norm.weight"][0])
    )


def test_a_block_that_gives_nan_is_named(copied: Built) -> None:
    from safetensors.torch import load_file, save_file

    directory = copied("llama")
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][:] = 3e38
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    model = BatchModel(open_checkpoint(directory), dtype=torch.float32, device=CPU)
    given = batches()[:1]
    states = model.embedded(given)
    with pytest.raises(ShortstackError, match="block 2 gives hidden states that are not finite in float32"):
        model.advance(given, states, range(6))


def test_a_disk_that_fills_is_an_error_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = BatchStates([(1, 4)], 8, torch.float32, tmp_path / "states.bin")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(
        ShortstackError, match=r"states\.bin: hidden states could not be written \(no space left"
    ) as error:
        states[0] = torch.zeros(1, 4, 8)
    assert "free some disk space, then run the same command again" in error.value.hint


def test_parameters_become_what_was_stored(built: Built) -> None:
    """The way back: names on disk, experts one by one."""
    for family in ("llama", "mixtral", "gpt2"):
        checkpoint = open_checkpoint(built(family))
        model = BatchModel(checkpoint, dtype=torch.float32, device=CPU)
        from safetensors.torch import load_file

        on_disk = load_file(built(family) / "model.safetensors")
        for index, block in model.weights.each([1, 4]):
            prefix = f"{model.skeleton.blocks_name}.{index}."
            named = {prefix + name: p.detach() for name, p in block.named_parameters()}
            stored = model.skeleton.conversion.stored(checkpoint.blocks[index], named)
            names = {tensor.name for tensor in checkpoint.blocks[index] if checkpoint.is_parameter(tensor.name)}
            assert stored.keys() == names, family
            for name, value in stored.items():
                assert torch.equal(value, on_disk[name]), name
        model.close()
