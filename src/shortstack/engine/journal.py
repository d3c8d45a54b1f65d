"""The saved state of a sweep: a run that was killed resumes from the last one, and gives the same scores bit for bit.

One file beside the output, replaced whole: what was being written when a process died is never seen. It belongs to one
run: a key names all that makes the figures (model, windows, criteria, precision, libraries, threads), and a state with
another key is not used.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shortstack.checkpoint.headers import TensorInfo, write_header
from shortstack.common.json_text import json_text, read_json
from shortstack.engine.storage import bytes_of
from shortstack.runtime.atomic_output import write_file
from shortstack.runtime.workspace import differences

STATE = "state.safetensors"
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class SavedState:
    """Tensors by name, and where the sweep was."""

    tensors: dict[str, torch.Tensor]
    record: dict[str, Any]


@dataclass
class Journal:
    """Saves the state of a run, and finds the one that an earlier run left.

    Attributes:
        folder: where the state lies; None saves nothing.
        key: what must agree for a state to be used.
        every_seconds: at least this long between two states within a group.
        extra: gives what else belongs to the state (scores so far), as JSON.
    """

    folder: Path | None
    key: dict[str, Any] = field(default_factory=dict)
    every_seconds: float = 60.0
    extra: Callable[[], Any] = lambda: None
    _saved_at: float = field(default_factory=time.monotonic)

    def found(self) -> SavedState | None:
        """The state of an earlier run with this key, or None; one that cannot be read is as good as none."""
        state = read_state(self.folder) if self.folder is not None else None
        return state if state is not None and not differences(state.record.get("key"), self.key) else None

    def due(self) -> bool:
        """Whether it is time to save again."""
        return self.folder is not None and time.monotonic() - self._saved_at >= self.every_seconds

    def save(self, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        """Replace the saved state."""
        if self.folder is None:
            return
        whole = {**record, "key": self.key, "extra": self.extra()}
        path = self.folder / STATE
        cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        listed = [
            TensorInfo(name, _NAMES[tensor.dtype], tuple(tensor.shape), path, 0, tensor.nbytes)
            for name, tensor in cpu.items()
        ]
        # Streams may take gigabytes: they are written as they lie in memory, not gathered first.
        write_file(path, write_header(listed, {"record": json_text(whole)}), *map(bytes_of, cpu.values()))
        self._saved_at = time.monotonic()


UNSAVED = Journal(None)


def read_state(folder: Path, *, tensors: bool = True) -> SavedState | None:
    """A saved state, whatever its key; None where there is none that can be read.

    Args:
        tensors: read them too; they are as large as the streams.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / STATE, "pt") as file:
            record = read_json((file.metadata() or {})["record"])
            held = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
    return SavedState(held, record) if isinstance(record, dict) else None
