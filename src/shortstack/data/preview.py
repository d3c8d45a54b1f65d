"""A text looked at before anything runs: a local one is opened, one on the hub is looked up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shortstack.checkpoint.hub import unreachable_hub
from shortstack.data.hub_datasets import NAMED_SETS, hub_files, hub_set_id
from shortstack.errors import ShortstackError

READ_BYTES = 64 << 10  # of a text that are enough to see what it is


def preview(source: str, role: Any, look: Callable[[], object]) -> list[str]:
    """Lines about a text on the hub; a local one is opened.

    Args:
        source: as in `--data`.
        role: what it is for, which decides the split.
        look: opens a local one.

    Raises:
        ShortstackError: what opening it, or the hub, says.
    """
    if source == "embedded" or Path(source).expanduser().exists():
        look()
        return []
    if source not in NAMED_SETS:
        hub_set_id(source)
    try:
        hub_files(source, role=role)
    except ShortstackError as error:
        if _is_out_of_reach():
            return [f"{source} was not looked at: {error.message.removeprefix(source + ': ')}"]
        raise
    return [f"{source} comes from the hub when it is needed"]


def _is_out_of_reach() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or unreachable_hub() is not None
