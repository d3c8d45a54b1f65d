"""Several processes on one recipe: the first runs it, the others take part in the steps that they share.

Under torchrun and accelerate every process runs the same command. Which steps are skipped is decided by the first one
alone, from what is on its disk; it tells the others through the launcher's own key-value store.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

from shortstack.runtime.distributed import Process, join, leave

Word = Literal["skip", "alone", "together", "end"]
_PATIENCE = timedelta(days=365)  # scoring or evaluating in the first process may take long


@dataclass
class Team:
    """The processes that were started together.

    Attributes:
        process: this one.
        heard: words so far.
    """

    process: Process
    heard: int = 0
    _store: Any = field(default=None, repr=False)

    @classmethod
    def from_environment(cls) -> Team:
        """As torchrun and accelerate tell it; one alone where no launcher started it."""
        return cls(Process.from_environment())

    @property
    def leads(self) -> bool:
        """Whether this process runs the recipe."""
        return self.process.leads

    def tell(self, word: Word) -> None:
        """Say what becomes of the next step."""
        if self.process.world > 1:
            self._connected().set(self._key(), word)
            self.heard += 1

    def hear(self) -> str:
        """What becomes of the next step; waits until the first process has said it."""
        word = self._connected().get(self._key()).decode()
        self.heard += 1
        return str(word)

    def gather(self) -> None:
        """Make the group of processes, once for all steps that need it."""
        join(self.process)

    def close(self) -> None:
        """Let the group go, where there is one."""
        if self.process.world > 1:
            leave()

    def _key(self) -> str:
        return f"shortstack/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{self.heard}"

    def _connected(self) -> Any:
        if self._store is None:
            from torch.distributed import TCPStore  # type: ignore[attr-defined]

            has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            # Without the launcher's store the first process keeps one, beside the port that training will use.
            port = int(os.environ["MASTER_PORT"]) + (0 if has_store else 1)
            leads = self.process.leads and not has_store
            self._store = TCPStore(os.environ["MASTER_ADDR"], port, is_master=leads, timeout=_PATIENCE)
        return self._store
