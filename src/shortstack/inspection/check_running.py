"""The part of a check that loads the model as a user does, and lets it generate."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint.headers import TensorInfo
from shortstack.checkpoint.reader import read_config
from shortstack.common.formatting import size
from shortstack.common.json_fields import nested
from shortstack.engine.load import from_directory, quiet_transformers
from shortstack.errors import UsageError, first_line
from shortstack.inspection.findings import Findings
from shortstack.runtime.memory import available_bytes

if TYPE_CHECKING:
    import torch

_NEW_TOKENS = 12
_PROMPT_TOKENS = 8


def check_running(
    findings: Findings, directory: Path, tensors: dict[str, TensorInfo], *, trust_remote_code: bool
) -> None:
    """Load a checkpoint, with the keys that transformers would invent or leave out without an error, and generate.

    Args:
        findings: gets the lines.
        directory: the checkpoint.
        tensors: what its weight files hold.
        trust_remote_code: run code that comes with the checkpoint.
    """
    import torch

    stored, wide = sum(t.nbytes for t in tensors.values()), 4 * sum(t.numel for t in tensors.values())
    free = available_bytes()
    if min(stored, wide) > free:
        findings.add("loads", "skip", f"not tried: {size(min(stored, wide))} of weights, {size(free)} of memory free")
        return
    # In the checkpoint's own precision, or where activations are rounded to few bits, results with and without a cache may
    # differ by rounding alone.
    exact = wide <= free and not _rounds_activations(directory)
    try:
        dtype: Any = torch.float32 if wide <= free else "auto"
        model, info = from_directory(directory, dtype=dtype, trust_remote_code=trust_remote_code)
    except UsageError as error:
        findings.add("loads", "skip", f"not tried: {error.message.removeprefix(f'{directory}: ')} ({error.hint})")
        return
    except Exception as error:  # transformers raises whatever a config class raises
        findings.add("loads", "fail", f"transformers cannot load it: {first_line(error)[:200]}")
        return
    findings.add("loads", "ok", type(model).__name__)
    for kind in ("missing_keys", "unexpected_keys"):
        keys = sorted(str(key) for key in info.get(kind, ()))
        name = kind.replace("_", " ")
        findings.add(name, "fail" if keys else "ok", f"{keys[0]} ({len(keys)})" if keys else "none")
    if info.get("missing_keys"):
        findings.add("generation", "skip", "not tried: weights are missing")
    else:
        _generates(findings, model, exact)


def _rounds_activations(directory: Path) -> bool:
    groups = nested(read_config(directory, allow_links=True)[0], "quantization_config", "config_groups")
    return isinstance(groups, dict) and any(nested(group, "input_activations") for group in groups.values())


def _generates(findings: Findings, model: Any, exact: bool) -> None:
    import torch

    text = model.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    length = _PROMPT_TOKENS if not isinstance(positions, int) else max(1, min(_PROMPT_TOKENS, positions - _NEW_TOKENS))
    ids = torch.arange(3, 3 + length)[None] % text.vocab_size
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    except Exception as error:  # whatever a wrong config leads to
        findings.add("forward", "fail", f"fails: {first_line(error)[:200]}")
        return
    if not bool(torch.isfinite(logits).all()):
        findings.add("forward", "fail", "logits hold NaN or infinity")
        return
    findings.add("forward", "ok", f"logits {list(logits.shape)}, all finite")
    findings.add("positions", "ok", f"{positions}" if positions else "not limited by the config")
    _caches(findings, model, ids, exact)


def _caches(findings: Findings, model: Any, ids: torch.Tensor, exact: bool) -> None:
    uncached = _generated(model, ids, use_cache=False)
    if isinstance(uncached, str):
        findings.add("generation", "fail", f"without a cache: {uncached}")
        return
    findings.add("generation", "ok", f"{len(uncached) - ids.shape[1]} tokens without a cache")
    for what, options in (("cached generation", {}), ("static cache", {"cache_implementation": "static"})):
        found = _generated(model, ids, use_cache=True, **options)
        if isinstance(found, str):
            # A static cache is not for every architecture; a plain one is.
            findings.add(what, "note" if options else "fail", found)
        elif found != uncached:
            pairs = enumerate(itertools.zip_longest(found, uncached))
            same = next(place for place, (one, other) in pairs if one != other) - ids.shape[1]
            rounding = "" if exact else f" (in {model.dtype}: it may be rounding)"
            says = f"gives other tokens than without a cache, from new token {same} on{rounding}"
            findings.add(what, "fail" if exact else "note", says)
        else:
            findings.add(what, "ok", "the same tokens as without")


def _generated(model: Any, ids: torch.Tensor, **options: Any) -> list[int] | str:
    import torch

    try:
        with torch.no_grad(), quiet_transformers():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=_NEW_TOKENS, do_sample=False,
                eos_token_id=None, pad_token_id=0, **options,
            )  # fmt: skip
    except Exception as error:  # generation fails in as many ways as there are caches
        return first_line(error)[:200]
    return [int(token) for token in made[0]]
