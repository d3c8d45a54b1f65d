"""A family that the table does not know: build it tiny, prune it, and compare with passing blocks over.

What the probe finds is a row like any other, made for one config: where blocks lie and which entries are per block is
read off a model of the same config with tiny widths, and every set of blocks is refused unless the tiny model, shortened
by that set, computes bit for bit what it computes with those blocks bypassed.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint.anatomy import Config, Family
from shortstack.checkpoint.config_file import config_text
from shortstack.checkpoint.drop_blocks import Cut, cut_blocks
from shortstack.checkpoint.reader import read_config
from shortstack.common.formatting import ranges
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError, first_line
from shortstack.families.open_model import open_checkpoint

if TYPE_CHECKING:
    import torch

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
# What every entry of a config that says a width is set to, where it is larger.
_TINY = {
    "vocab_size": 96, "hidden_size": 64, "n_embd": 64, "d_model": 64, "intermediate_size": 96, "n_inner": 96,
    "ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "head_dim": 16, "num_attention_heads": 4, "n_head": 4,
    "n_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "max_position_embeddings": 64, "n_positions": 64, "sliding_window": 4, "state_size": 8,
}  # fmt: skip
_MOST_PARAMETERS = 50_000_000


def probed_family(model_type: str, config: Config, progress: Progress) -> Family:
    """A row for the family of a checkpoint with this config, if it can be shortened exactly.

    Raises:
        ShortstackError: transformers has no causal language model of this type, it cannot be built tiny, or no block
            could be removed exactly.
    """
    progress.say(f"the family {model_type} is not in the table: testing a tiny model of this family")
    row = _Probe(model_type, config).row()
    progress.say(f"{model_type} can be shortened exactly; every set of blocks is tested before it is removed")
    return row


class _Probe:
    """The tiny model of one config, and what is read off it."""

    def __init__(self, model_type: str, config: Config) -> None:
        self._type = model_type
        self._config = config
        self._depth = next((config[key] for key in _COUNTS if type(config.get(key)) is int), 0)
        if self._depth < 2 or any(isinstance(value, Mapping) and "model_type" in value for value in config.values()):
            raise self._refusal("its config does not say how many blocks it has, or holds several models")
        if config.get("is_encoder_decoder"):
            raise self._refusal("it is an encoder-decoder")
        self._tried: dict[tuple[int, ...], str | None] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="shortstack-probe-"))  # lives as long as the row that asks it
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._tiny = self._folder / "tiny"
        self._model = self._built()

    def row(self) -> Family:
        row = self._read_off()
        self._checkpoint = open_checkpoint(self._tiny, family=row)
        last = self._depth - 1
        reasons = [self._try_out([index]) for index in (0, last // 2, last)]
        if all(reasons):
            raise self._refusal(str(reasons[1]))
        row = replace(row, resident=self._reason_against_streaming())

        def refusal(config: Config, depth: int, removed: Sequence[int], names: Collection[str]) -> str | None:
            return self._try_out(removed)

        return replace(row, refusal=refusal)

    def _refusal(self, reason: str) -> ShortstackError:
        return ShortstackError(
            f"the family {self._type!r} is not in shortstack's table, and probing it did not help: {reason}",
            hint="`shortstack families` lists those that are known; docs/adding-a-family.md shows how to add one",
        )

    def _built(self) -> Any:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        tiny = {key: min(value, _TINY[key]) for key, value in self._config.items() if _shrinks(key, value)}
        given = {key: value for key, value in {**self._config, **tiny}.items() if key not in _LEFT_OUT}
        try:
            config = AutoConfig.for_model(self._type, **given)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                with torch.device("meta"):
                    size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
                if size > _MOST_PARAMETERS:
                    raise self._refusal(f"its tiny model would have {size} parameters")
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.is_floating_point():
                            parameter.add_(torch.randn(parameter.shape) * 0.1)
            model.save_pretrained(self._tiny)
        except ShortstackError:
            raise
        except Exception as error:  # a config class may refuse tiny widths in any way
            raise self._refusal(f"no tiny model of it can be built ({first_line(error)[:200]})") from None
        return model

    def _read_off(self) -> Family:
        """The row: prefix, counts, lists and the names of embedding and head."""
        from shortstack.checkpoint.headers import read_weights

        names = list(read_weights(self._tiny)[0])
        numbered = [match for name in names if (match := re.match(r"(.*?\.)(\d+)\.", name))]
        groups: dict[str, set[int]] = {}
        for match in numbered:
            groups.setdefault(match.group(1), set()).add(int(match.group(2)))
        sizes = Counter(match.group(1) for match in numbered)
        fitting = [prefix for prefix, found in groups.items() if found == set(range(self._depth))]
        if not fitting:
            raise self._refusal(f"no list of {self._depth} blocks is in its tensor names")
        saved, _ = read_config(self._tiny)
        expanded = _lists(self._model.config.to_dict(), self._depth)
        embedding, head = self._ends(names)

        def implied(config: Config, depth: int) -> dict[str, list[Any]]:
            return expanded if depth == self._depth else {}

        return Family(
            self._type,
            prefix=max(fitting, key=lambda prefix: sizes[prefix]),
            counts=tuple(
                key for key in _COUNTS if saved.get(key) == self._depth or self._config.get(key) == self._depth
            ),
            lists=tuple(expanded),
            implied=implied,
            embedding=embedding,
            head=head,
            tied=bool(getattr(self._model.config, "tie_word_embeddings", False)),
        )

    def _ends(self, names: list[str]) -> tuple[str, str]:
        by_module = {id(module): name for name, module in self._model.named_modules()}
        embedding = by_module.get(id(self._model.get_input_embeddings()), "") + ".weight"
        head = by_module.get(id(self._model.get_output_embeddings()), "") + ".weight"
        if embedding not in names:
            raise self._refusal(f"its embedding {embedding!r} is stored under another name")
        return embedding, head

    def _try_out(self, removed: Sequence[int]) -> str | None:
        """Why removing these positions is not exact, or None: from the tiny model, remembered."""
        key = tuple(sorted(removed))
        if key not in self._tried:
            self._tried[key] = self._compared(key)
        return self._tried[key]

    def _compared(self, removed: tuple[int, ...]) -> str | None:
        import torch

        from shortstack.engine.load import aligned, from_directory

        checkpoint = self._checkpoint
        kept = [index for index in range(self._depth) if index not in removed]
        out = self._folder / f"pruned-{len(self._tried)}"
        out.mkdir()
        try:
            _write(out, cut_blocks(checkpoint, kept))
            pruned, info = from_directory(out, dtype=torch.float32)
            odd = sorted({*info["missing_keys"], *info["unexpected_keys"]})
            if odd:
                return f"tested on a tiny model: {odd[0]} is missing or left over"
            ids = self._ids()
            with torch.no_grad():
                found = aligned(pruned)(input_ids=ids, use_cache=False).logits
            if not torch.equal(found, self._passed_over(removed)):
                return f"tested on a tiny model: the result without block {ranges(removed)} is not exact"
        except Exception as error:  # whatever a shortened config or a passed-over block leads to
            return f"tested on a tiny model: {first_line(error)[:200]}"
        return None

    def _passed_over(self, removed: Collection[int]) -> torch.Tensor:
        from shortstack.engine.stand_ins import bypassed_logits

        return bypassed_logits(self._model, self._checkpoint.anatomy, removed, self._ids())

    def _reason_against_streaming(self) -> str:
        """Why the whole model must be held; empty where the streaming engine gives the model's own logits."""
        import torch

        from shortstack.engine.streamed import streamed_logits

        try:
            logits = streamed_logits(self._checkpoint, range(self._depth), self._ids())
        except ShortstackError as error:
            return getattr(error, "reason", error.message)
        except Exception as error:  # in a model's own code anything may fail that its blocks alone lack
            return f"its blocks cannot be run one at a time ({type(error).__name__}: {first_line(error)[:200]})"
        same = torch.equal(logits, self._passed_over(()))
        return "" if same else "its blocks, run one at a time, do not give what the model gives"

    def _ids(self) -> torch.Tensor:
        import torch

        rows = int(self._model.get_input_embeddings().weight.shape[0])
        return torch.arange(3, 3 + 28).reshape(2, 14).remainder(rows)


# Entries that say nothing about the architecture, or that AutoConfig sets itself.
_LEFT_OUT = ("model_type", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "_name_or_path")


def _shrinks(key: str, value: Any) -> bool:
    return key in _TINY and type(value) is int


def _lists(config: Mapping[str, Any], depth: int) -> dict[str, list[Any]]:
    return {key: value for key, value in config.items() if isinstance(value, list) and len(value) == depth}


def _write(directory: Path, cut: Cut) -> None:
    from shortstack.checkpoint.byte_copy import copy_tensors, new_header

    (directory / "config.json").write_text(config_text(cut.config))
    copy_tensors(cut.tensors, directory / "model.safetensors", header=new_header(cut.tensors, {"format": "pt"}))
