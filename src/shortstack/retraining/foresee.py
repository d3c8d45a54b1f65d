"""What retraining, merging and teaching read and will leave behind, looked at before anything runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from shortstack.checkpoint.forecast import Estimate, Forecast
from shortstack.common.formatting import count
from shortstack.data.instructions import kind_of
from shortstack.data.preview import READ_BYTES, preview
from shortstack.data.sources import read_corpus
from shortstack.pruning.plan import parse_amount
from shortstack.retraining.options import LoRA, TeachOptions

_STATE_BYTES = 12  # of each trained parameter in a saved state: itself and AdamW's two moments, in float32
_SAVED_STATES = 3  # the last two and the best
_KEPT_LOGIT_BYTES = 6  # a token id and a float16
_STORED_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check_training(values: Mapping[str, Any]) -> list[str]:
    """Look at what is trained on and what is followed meanwhile; lines about what could not be looked at.

    Raises:
        ShortstackError: it cannot be used.
    """
    notes = []
    if data := values.get("data"):
        notes += preview(data, "training", functools.partial(kind_of, data))
    for text in filter(None, (values.get("eval_data") or "").split(",")):
        look = functools.partial(read_corpus, text, role="evaluation", limit_bytes=READ_BYTES)
        notes += preview(text, "evaluation", look)
    return notes


def estimate_training(values: Mapping[str, Any]) -> Estimate:
    """The checkpoint, and the saved states while it is trained."""
    model = _stored(values.get("model"), values)
    if model is None:
        return Estimate("checkpoint")
    is_lora = values.get("train") == "lora"
    trained = _adapter_parameters(model, values.get("rank", LoRA.rank)) if is_lora else model.parameters
    makes = f"{len(model.kept)} blocks, {count(model.parameters)} parameters"
    return Estimate(makes, model.nbytes, _SAVED_STATES * _STATE_BYTES * trained, model)


def estimate_lora(values: Mapping[str, Any]) -> Estimate:
    """The checkpoint with the adapter folded in, or the adapter alone."""
    estimate = estimate_training({**values, "train": "lora"})
    if estimate.forecast is None or values.get("merge", True):
        return estimate
    trained = _adapter_parameters(estimate.forecast, values.get("rank", LoRA.rank))
    return Estimate(f"an adapter of {count(trained)} parameters", 4 * trained, estimate.temporary_nbytes)


def estimate_merge(values: Mapping[str, Any]) -> Estimate:
    """The base, with the adapter folded in."""
    base = _stored(values.get("base"), values)
    if base is None:
        return Estimate("checkpoint")
    return Estimate(f"{len(base.kept)} blocks, {count(base.parameters)} parameters", base.nbytes, forecast=base)


def estimate_teach(values: Mapping[str, Any]) -> Estimate:
    """The cached logits, where it is said of how many tokens."""
    tokens = values.get("tokens")
    kept = values.get("top_k", TeachOptions.top_k) * _KEPT_LOGIT_BYTES
    return Estimate("teacher logits", parse_amount(tokens, "tokens", "tokens") * kept if tokens else 0)


def _stored(model: Forecast | None, values: Mapping[str, Any]) -> Forecast | None:
    """The model in the precision that it will be stored in."""
    dtype = values.get("save_dtype")
    if model is None or dtype is None:
        return model
    return dataclasses.replace(model, stored=_STORED_BYTES[dtype])


def _adapter_parameters(model: Forecast, rank: int) -> int:
    """Of rank-r factors beside every matrix of the blocks that stay."""
    blocks = [model.checkpoint.blocks[position] for position in model.kept]
    return sum(rank * sum(tensor.shape) for block in blocks for tensor in block if len(tensor.shape) == 2)
