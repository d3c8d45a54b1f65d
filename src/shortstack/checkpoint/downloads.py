"""What a download from the hub shows on a terminal: one bar with the name, the size, and how far it is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from shortstack.common.phases import phase
from shortstack.common.progress import Progress, on_a_terminal


@contextlib.contextmanager
def shown_download(name: str, nbytes: int | None) -> Iterator[dict[str, Any]]:
    """What to call a download of huggingface_hub with, so that its progress shows as one bar; nothing off a terminal.

    Args:
        name: what is downloaded.
        nbytes: how much is to come; None where nobody said.
    """
    if not on_a_terminal() or nbytes == 0:
        with phase("downloading"):
            yield {}
        return
    with Progress().bar(f"downloading {name}", nbytes, "B") as advance:
        yield {"tqdm_class": counting_bar(advance)}


def counting_bar(advance: Callable[[int], object]) -> type:
    """A class of bars for huggingface_hub that show nothing and pass on how many bytes have come.

    The library has one bar for what comes over the network and one for what reaches the disk, and no fixed names for them:
    what the furthest of them counts is passed on.
    """
    from tqdm.std import tqdm

    counts: dict[int, float] = {}
    lock = threading.Lock()
    shown = 0

    class CountingBar(tqdm):  # type: ignore[misc]
        """Counts bytes; everything else is left to a bar that is switched off."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self.is_of_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})
            self.update(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            nonlocal shown
            if self.is_of_bytes:
                with lock:
                    counts[id(self)] = counts.get(id(self), 0) + (n or 0)
                    new = int(max(counts.values()))
                    if new > shown:
                        advance(new - shown)
                        shown = new

    return CountingBar
