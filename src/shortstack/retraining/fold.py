"""Fold an adapter into a model in memory, and compare what comes of it with the model and its adapter apart."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shortstack.checkpoint.adapter import check_blocks, read_adapter_config
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.process_state import same_random_state
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError, first_line
from shortstack.retraining.export import stored_model
from shortstack.runtime.memory import available_bytes
from shortstack.runtime.private_names import adapter_layer, adapter_tuner, own_key_mapping

_ROOM = 0.7  # share of free memory that the model in float32 may take
_WINDOWS, _SEQ_LEN = 2, 32
# Largest difference of logits, as a share of the largest logit: folding in float32, and in 16 bit.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_16_BIT = 5e-2
_BESIDE = "load it beside the model, with PEFT"
_TRAINED_ON = "--base MODEL: the very checkpoint that it was trained on"


@same_random_state()  # PEFT draws an adapter's beginning before it reads the adapter
def merged_model(
    checkpoint: Checkpoint, adapter: Path, *, trust_remote_code: bool = False, progress: Progress | None = None
) -> Any:
    """The base model on the CPU with the adapter folded in: PEFT's own merge, in float32 where that fits in memory.

    Head and embedding that were one tensor and no longer are (an adapter on one of them, or trained copies of both) become
    two, and the model's config says so.

    Raises:
        ShortstackError: the adapter does not fit this checkpoint, cannot be folded, or what was folded computes
            something other than base and adapter together.
    """
    progress = progress or Progress(quiet=True)
    if "quantization_config" in checkpoint.config:
        raise ShortstackError(
            f"{checkpoint.source}: is quantized; an adapter can be folded only into full-precision weights",
            hint="--base MODEL: the checkpoint before it was quantized",
        )
    check_blocks(adapter, checkpoint, progress)
    config = _peft_config(adapter, progress)
    wide = torch.float32 if 4 * checkpoint.parameters() < _ROOM * available_bytes() else None
    model = stored_model(checkpoint, trust_remote_code=trust_remote_code, dtype=wide)
    with _one_line(f"{adapter}: does not fit {checkpoint.source}", _TRAINED_ON):
        adapted = _with_adapter(model, config, adapter, checkpoint)
        expected = _logits(adapted, checkpoint)
    with _one_line(f"{adapter}: cannot be folded into {checkpoint.source}", _BESIDE):
        folded = _folded(adapted, checkpoint, progress)
        found = _logits(folded, checkpoint)
    difference = float((found - expected).abs().max())
    tolerance = _TOLERANCE.get(next(folded.parameters()).dtype, _TOLERANCE_16_BIT)
    if not difference <= tolerance * max(1.0, float(expected.abs().max())):
        raise ShortstackError(
            f"{adapter}: folded into {checkpoint.source}, its logits differ from base and adapter by up to {difference:.3g}; "
            "no output was written",
            hint="please report this, with adapter_config.json",
        )
    return folded


def _peft_config(adapter: Path, progress: Progress) -> Any:
    """The adapter's settings as the installed PEFT knows them; of a newer PEFT's own, those that are off are ignored."""
    import peft
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    raw = read_adapter_config(adapter)
    place = adapter / "adapter_config.json"
    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(raw.get("peft_type"))
    newer = "install a newer PEFT (pip install --upgrade peft), then merge again"
    if kind is None:
        raise ShortstackError(
            f"{place}: peft_type is {raw.get('peft_type')!r}, which PEFT {peft.__version__} does not support",
            hint=newer,
        )
    known = inspect.signature(kind.__init__).parameters
    unknown = {key: value for key, value in raw.items() if key not in known}
    used = {key: value for key, value in unknown.items() if value not in (None, False, [], {}, "")}
    if used:
        key, value = next(iter(used.items()))
        raise ShortstackError(
            f"{place}: {key} is {value!r}, which PEFT {peft.__version__} does not support", hint=newer
        )
    if unknown:
        progress.say(
            f"{place}: {', '.join(unknown)}: unknown to PEFT {peft.__version__}; switched off there, so ignored"
        )
    with _one_line(f"{place}: PEFT {peft.__version__} refuses it", newer):
        return kind(**{key: value for key, value in raw.items() if key in known})


def _with_adapter(model: Any, config: Any, adapter: Path, checkpoint: Checkpoint) -> Any:
    """The model with the adapter beside its weights; every tensor of the adapter in its place.

    Raises:
        ShortstackError: a tensor of the adapter finds no place, or a place has no tensor.
    """
    from peft import PeftModel

    config.inference_mode = True
    adapted = PeftModel(model, config)
    if not isinstance(adapted.base_model, adapter_tuner()):
        raise ShortstackError(
            f"{adapter}: {getattr(config.peft_type, 'value', config.peft_type)} does not change the model's weights, so it "
            "cannot be folded into them",
            hint=_BESIDE,
        )
    mapping = own_key_mapping(model)
    loaded = adapted.load_adapter(str(adapter), "default", torch_device="cpu", key_mapping=mapping)
    for keys, says in (
        (loaded.unexpected_keys, f"of its tensors do not belong to {checkpoint.source}"),
        (loaded.missing_keys, "tensors that its config calls for are not in it"),
    ):
        if keys:
            first = min(keys).replace(".default", "")
            raise ShortstackError(
                f"{adapter}: {len(keys)} {says}, the first {first}",
                hint="download the adapter again, or give the checkpoint that it was trained on: --base MODEL",
            )
    return adapted.eval()


def _folded(adapted: Any, checkpoint: Checkpoint, progress: Progress) -> Any:
    """The plain model with every change in its weights, each made once."""
    kind = adapter_layer()
    config, model = adapted.peft_config["default"], adapted.get_base_model()
    embedding, head = _root(model.get_input_embeddings()), _root(model.get_output_embeddings())
    was_tied = head is not None and head.weight is embedding.weight
    if was_tied:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    for layer in adapted.modules():
        if isinstance(layer, kind):
            with _in_float32(layer.get_base_layer()):  # PEFT rounds the product first; in float32 there is one rounding
                layer.merge(safe_merge=True)
    plain = adapted.unload()
    embedding, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    if was_tied:
        if getattr(config, "ensure_weight_tying", False) or torch.equal(head.weight, embedding.weight):
            head.weight = embedding.weight
        else:
            progress.say(
                f"{checkpoint.source}: head and embedding were one tensor, but the adapter changes them separately: both are "
                "written, and config.json has tie_word_embeddings: false"
            )
            for part in (plain.config, plain.config.get_text_config()):
                part.tie_word_embeddings = False
    return plain


def _root(module: Any) -> Any:
    """The module that an adapter wraps."""
    while module is not None:
        inner = getattr(module, "original_module", None) or getattr(module, "base_layer", None)
        if inner is None and (wrapped := getattr(module, "token_adapter", None)) is not None:
            inner = wrapped
        if inner is None:
            return module
        module = inner
    return None


@contextlib.contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    """Within, the module's parameters are in float32."""
    stored = {name: parameter.dtype for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.data = parameter.data.float()
    yield
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(stored.get(name, parameter.dtype))


def _logits(model: Any, checkpoint: Checkpoint) -> torch.Tensor:
    rows = checkpoint.tensors[checkpoint.anatomy.embedding].shape[0]
    length = min(_SEQ_LEN, checkpoint.positions or _SEQ_LEN)
    ids_BT = torch.randint(rows, (_WINDOWS, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids_BT, use_cache=False).logits.float()
    return logits


@contextlib.contextmanager
def _one_line(what: str, hint: str) -> Iterator[None]:
    """Within, whatever PEFT raises of files that it does not expect (which is anything) is an error of one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of (keys that are missing, ties) is checked here
            yield
    except ShortstackError:
        raise
    except Exception as error:
        raise ShortstackError(f"{what}: {first_line(error)[:300]}", hint=hint) from None
