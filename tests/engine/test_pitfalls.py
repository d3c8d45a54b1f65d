"""What each family does differently when its blocks are run one at a time: each test fails without its handling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.common.progress import Progress
from shortstack.data.calibration import CalibrationSet
from shortstack.engine.block_model import NotSeparableError, Skeleton
from shortstack.engine.block_weights import BlockWeights
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.scoring.criteria import scored_parameters
from shortstack.scoring.score import score_windows
from tests.families import tiny

Tiny = Callable[[str], Path]
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def streamed_logits(model: Path) -> list[torch.Tensor]:
    """Twice, with the same recorded calls: what is replayed must not remember."""
    skeleton = Skeleton(tiny.open_checkpoint(model), dtype=torch.float32, device=CPU)
    found = []
    with torch.no_grad(), BlockWeights(skeleton, resident=False) as weights:
        for _ in range(2):
            hidden = skeleton.first_hidden(tiny.WINDOWS)
            for index, block in weights.each(range(len(skeleton.blocks))):
                hidden = skeleton.run_block(block, hidden, skeleton.calls(tiny.WINDOWS)[index])
            found.append(skeleton.logits(hidden, tiny.WINDOWS))
    return found


PITFALLS = {
    "llama": "attention with the mask of another implementation would not be causal",
    "granitemoe": "a live cache is passed although it is switched off: replayed, it would grow",
    "granitemoeshared": "the same",
    "falcon": "blocks return a tuple",
    "bloom": "a tuple, and a bias by position in its arguments",
    "bamba": "the model takes a block's result apart, and fails on a tensor",
    "openai-gpt": "blocks return a list",
    "gemma2": "masks vary by layer type",
    "cohere2": "rotary positions in some blocks only",
    "gemma3_text": "rotary positions vary by layer type",
    "gptj": "a table in the blocks would be left on the meta device",
    "codegen": "the same",
    "gpt_neo": "a causal mask in the blocks would be left on the meta device",
    "recurrent_gemma": "rotary frequencies in the blocks would be left on the meta device",
    "falcon_mamba": "norms that no checkpoint holds would be left on the meta device",
    "falcon_h1": "the model, not the block, registers a table in its blocks",
    "mixtral": "experts are stored one by one and computed with in one tensor",
    "gpt_oss": "experts are stored fused, with biases",
    "deepseek_v3": "the first blocks are dense; a correction of the router is a buffer that is stored",
    "minimax": "decays are buffers that are stored",
    "nemotron_h": "names on disk begin otherwise than in memory",
    "gemma3": "the language model lies inside a composite, whose other parts are there too",
    "olmo_hybrid": "three convolutions on disk are one in memory",
    "ctrl": "hidden states are given positionally with others after them",
}


@pytest.mark.parametrize("name", sorted(PITFALLS))
def test_one_block_at_a_time_gives_the_models_own_logits(tiny_model: Tiny, name: str) -> None:
    model, _ = tiny.load(tiny_model(name))
    with torch.no_grad():
        expected = model(input_ids=tiny.WINDOWS, use_cache=False).logits
    for found in streamed_logits(tiny_model(name)):
        assert torch.equal(found, expected), PITFALLS[name]


# State between blocks, hidden states of another shape, arguments that depend on the text.
WHOLE = (
    "zaya",
    "glm_moe_dsa",
    "gemma3n_text",
    "gemma4_text",
    "zamba",
    "deepseek_v4",
    "qwen4_exp_text",
    "xlnet",
    "rwkv",
    "cpmant",
)


class Said(Progress):
    """The lines that a run says."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        object.__setattr__(self, "lines", [])

    def say(self, line: str) -> None:
        self.lines.append(line)  # type: ignore[attr-defined]


@pytest.mark.fault(106)
@pytest.mark.parametrize("error", [ValueError, TypeError, IndexError])
@pytest.mark.parametrize("where", ["before the blocks", "between them"])
def test_a_model_that_fails_is_not_taken_for_one_that_must_be_held_whole(
    built: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, error: type[Exception], where: str
) -> None:
    from transformers.models.llama import modeling_llama

    from shortstack.scoring.criteria import parse_criteria

    real = modeling_llama.LlamaModel.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if where == "between them":
            block = self.layers[2]
            self.layers[2] = _Failing(error)
            try:
                return real(self, *args, **kwargs)
            finally:
                self.layers[2] = block
        raise error("no such place")

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
    windows, said = CalibrationSet(tiny.WINDOWS.tolist(), {}), Said()
    with pytest.raises(ShortstackError, match=rf"the model's own forward fails: {error.__name__}: no such place"):
        score_windows(open_checkpoint(built("llama")), windows, parse_criteria("ppl"), progress=said)
    assert said.lines == []  # type: ignore[attr-defined]


class _Failing(torch.nn.Module):
    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.error = error

    def forward(self, *_: Any, **__: Any) -> Any:
        raise self.error("no such place")


@pytest.mark.parametrize("name", WHOLE)
def test_families_whose_blocks_cannot_be_run_alone_are_held_whole(tiny_model: Tiny, name: str) -> None:
    from shortstack.scoring.criteria import parse_criteria

    checkpoint = tiny.open_checkpoint(tiny_model(name))
    windows = CalibrationSet(tiny.WINDOWS.tolist(), {})
    said = Said()
    found = score_windows(checkpoint, windows, parse_criteria("ppl"), progress=said)
    reason = checkpoint.anatomy.family.resident
    assert said.lines == [f"{checkpoint.source}: the whole model is held in memory, and runs once per block: {reason}"]
    assert found.settings["memory"] == "resident"
    assert found.settings["whole_model"] == checkpoint.anatomy.family.resident
    with pytest.raises(ShortstackError, match="--memory streamed, but"):
        score_windows(checkpoint, windows, parse_criteria("ppl"), memory="streamed")


@pytest.mark.parametrize("name", ["zamba", "deepseek_v4"])
def test_arguments_that_depend_on_the_text_are_detected(tiny_model: Tiny, name: str) -> None:
    """The row says so too; the engine finds it out by itself."""
    skeleton = Skeleton(tiny.open_checkpoint(tiny_model(name)), dtype=torch.float32, device=CPU)
    with pytest.raises(NotSeparableError):
        skeleton.calls(tiny.WINDOWS)


def scored(model: Path) -> dict[int, set[str]]:
    skeleton = Skeleton(tiny.open_checkpoint(model), dtype=torch.float32, device=CPU)
    return {index: {p.name for p in scored_parameters(block)} for index, block in enumerate(skeleton.blocks)}


@pytest.mark.parametrize(
    ("name", "block", "expected"),
    [
        ("mixtral", 0, {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "input_layernorm.weight",
                        "post_attention_layernorm.weight", *(f"self_attn.{x}_proj.weight" for x in "qkvo")}),
        ("gpt_oss", 0, {"mlp.router.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "input_layernorm.weight",
                        "post_attention_layernorm.weight", *(f"self_attn.{x}_proj.weight" for x in "qkvo")}),
        ("gpt2", 0, {"ln_1.weight", "ln_2.weight", "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight",
                     "mlp.c_proj.weight"}),
    ],
)  # fmt: skip
def test_what_is_scored(tiny_model: Tiny, name: str, block: int, expected: set[str]) -> None:
    """Every matrix (experts and routers, fused or not) and norm weights; never biases (of gpt_oss's experts) and sinks."""
    assert scored(tiny_model(name))[block] == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("falcon_h1", {"mamba.in_proj.weight", "mamba.conv1d.weight", "self_attn.q_proj.weight"}),
        ("mamba", {"mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.x_proj.weight"}),  # its A_log is a matrix
    ],
)
def test_state_space_matrices_are_not_scored(tiny_model: Tiny, name: str, expected: set[str]) -> None:
    names = scored(tiny_model(name))[0]
    assert expected <= names
    assert not any(part.endswith(("A_log", ".D", "bias")) for part in names)


def test_rows_of_conv1d_are_outputs(tiny_model: Tiny) -> None:
    skeleton = Skeleton(tiny.open_checkpoint(tiny_model("gpt2")), dtype=torch.float32, device=CPU)
    dims = {p.name: p.output_dim for p in scored_parameters(skeleton.blocks[0])}
    assert dims["attn.c_attn.weight"] == 1


def test_infinity_in_a_config_is_kept_as_it_stands(tiny_model: Tiny, tmp_path: Path) -> None:
    """Configs hold what a config class would not write again: the raw JSON is edited."""
    import json

    from shortstack.pruning.prune import prune

    before = json.loads((tiny_model("bamba") / "config.json").read_text())
    prune(str(tiny_model("bamba")), out=tmp_path / "p", blocks="2", quiet=True)
    after: dict[str, Any] = json.loads((tmp_path / "p/config.json").read_text())
    assert "Infinity" in json.dumps(before)
    assert after == {**before, "num_hidden_layers": 5, "attn_layer_indices": [1, 3, 4]}
