"""The options of the demo page, and what its server allows whatever a page sends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from shortstack.checkpoint.options import CheckpointOptions, ComputeOptions
from shortstack.errors import UsageError
from shortstack.evaluation.options import EvaluationOptions

# Name -> (smallest, largest, as the page begins); ranges of the published demo, seeds aside.
RANGES: dict[str, tuple[float, float, float]] = {
    "new_tokens": (32, 256, 64),
    "batch": (1, 8, 1),
    "seed": (0, 2**31 - 1, 0),
    "top_k": (1, 1000, 50),
    "top_p": (0.05, 1.0, 0.95),
    "temperature": (0.0, 2.0, 1.0),
}


@dataclass(frozen=True)
class Limits:
    """What one visitor can ask for.

    Attributes:
        characters: of a prompt.
        seconds: of one generation.
        waiting: visitors in the queue.
    """

    characters: int = 4000
    seconds: int = 300
    waiting: int = 16

    def clamped(self, name: str, value: object) -> float:
        """A number within its range; what is no number is what the page begins with."""
        low, high, start = RANGES[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            return start
        return min(max(float(value), low), high)


@dataclass(frozen=True)
class DemoOptions(ComputeOptions, CheckpointOptions):
    """Where the page is served, to whom, and how its models are run.

    Attributes:
        port: The port of the page. 0 chooses a free port.
        public: Serve the page to other machines too. This requires a password.
        user: The user name for the password.
        password_env: The environment variable that holds the password.
        quiet: Show no messages on stderr.
    """

    LAST: ClassVar[tuple[str, ...]] = ("dtype", "device", *CheckpointOptions.LAST)

    port: int = 7860
    public: bool = False
    user: str = "demo"
    password_env: str = "SHORTSTACK_DEMO_PASSWORD"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port {self.port}: expected a number from 0 to 65535")

    @property
    def running(self) -> EvaluationOptions:
        """How the models are run."""
        return EvaluationOptions(
            dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code,
            allow_links=self.allow_links, quiet=self.quiet, tokenizer=self.tokenizer,
        )  # fmt: skip
