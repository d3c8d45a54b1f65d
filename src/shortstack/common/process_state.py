"""What belongs to the process that a function is called in, and is put back where a library changes it."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator


@contextlib.contextmanager
def same_random_state() -> Iterator[None]:
    """Within, a library may seed what it likes: the caller's generators are left as they were."""
    import numpy as np
    import torch

    python, array = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


@contextlib.contextmanager
def logging_at(logger: str, level: int) -> Iterator[None]:
    """Within, a library's logger has this level. The library must be imported before: that may set another."""
    found = logging.getLogger(logger)
    before = found.level
    found.setLevel(level)
    try:
        yield
    finally:
        found.setLevel(before)
