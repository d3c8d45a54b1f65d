"""Tensor names with something in front of, or inside, the names that the model has: which wrapper put it there."""

from __future__ import annotations

import re
from collections.abc import Sequence

from shortstack.errors import ShortstackError

# What a wrapper puts into names -> (the wrapper, how to save without it).
_WRAPPERS = {
    "_orig_mod.": ("torch.compile", "save what was compiled: model._orig_mod.save_pretrained(...)"),
    "module.": ("DistributedDataParallel", "save what is inside: model.module.save_pretrained(...)"),
    "base_model.model.": ("PEFT", "merge_and_unload() of PEFT first, then save_pretrained(...)"),
    "_fsdp_wrapped_module.": ("FSDP", "save a full state dict: accelerator.get_state_dict(model)"),
    "_checkpoint_wrapped_module.": ("activation checkpointing", "save the model without checkpoint_wrapper"),
    "language_model.": ("a model of text and images", "save its language model alone: model.language_model"),
}
# What PEFT puts into the names of the modules that it wraps, until its adapters are merged.
_UNMERGED = re.compile(
    r"\.(base_layer|lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|original_module|modules_to_save)(\.|$)"
)
_INSIDE = tuple(part for part in _WRAPPERS if part.startswith("_"))


def refuse_wrapped(names: Sequence[str], prefix: str, place: str) -> None:
    """Refuse names that a wrapper has changed: transformers would leave those weights random.

    Args:
        names: all tensor names of a checkpoint.
        prefix: what stands before the number of a block in this family.
        place: the checkpoint, as errors name it.

    Raises:
        ShortstackError: there are such names; says what stands in them, who puts it there, and how to save without it.
    """
    for part in _INSIDE:
        inside = next((name for name in names if f".{part}" in f".{name}"), None)
        if inside is not None:
            raise _refusal(place, part, inside)
    unmerged = next((name for name in names if _UNMERGED.search(name)), None)
    if unmerged is not None:
        raise ShortstackError(
            f"{place}: a tensor is named {unmerged}, as in PEFT's model before its adapter is merged; transformers would "
            "not load it",
            hint=_WRAPPERS["base_model.model."][1],
        )
    if any(name.startswith(prefix) for name in names):
        return
    numbered = re.compile(rf"(.+\.){re.escape(prefix)}\d+\.")
    for name in names:
        if match := numbered.match(name):
            raise _refusal(place, match.group(1), name)


def _refusal(place: str, part: str, name: str) -> ShortstackError:
    who, instead = _WRAPPERS.get(part, ("", f"rename the tensors: take {part!r} off the front of their names"))
    by = f", which {who} puts there" if who else ""
    return ShortstackError(
        f"{place}: tensor names have the prefix {part!r}{by} ({name}); transformers would not load them", hint=instead
    )
