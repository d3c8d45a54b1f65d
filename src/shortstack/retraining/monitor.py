"""What a run says while it goes on: a line per logging step, and the picture of its losses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.common.formatting import seconds
from shortstack.common.progress import Progress
from shortstack.errors import UsageError

if TYPE_CHECKING:
    import torch

_WARM_UP = 2  # steps that say nothing about speed
_TRACKERS = ("tensorboard", "trackio", "wandb")


@dataclass
class Monitor:
    """Speed and progress of a run.

    Attributes:
        total: steps in all.
        flops_per_token: operations that training on one token takes.
        peak_flops: what the device reaches in matrix products, per second; 0 where it was not measured.
    """

    progress: Progress
    total: int
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    _times: list[tuple[float, int, int]] = field(default_factory=list)

    def step_done(self, step: int, tokens: int) -> None:
        """Note that a step ended, having trained on `tokens` tokens over all processes."""
        before = self._times[-1][2] if self._times else 0
        self._times.append((time.perf_counter(), step, before + tokens))
        if len(self._times) > 200:
            del self._times[100]  # the first ones and the last ones say enough

    def pause(self, started: float) -> None:
        """Take the time of an evaluation or a save since `started` out of the speed."""
        lost = time.perf_counter() - started
        self._times = [(at + lost, step, tokens) for at, step, tokens in self._times]

    def figures(self) -> dict[str, float]:
        """tokens_per_second, share_of_peak, seconds_left, as far as they are known."""
        first = min(_WARM_UP, len(self._times) - 1)
        if first < 0 or len(self._times) - 1 <= first:
            return {}
        (began, first_step, first_tokens), (now, step, tokens) = self._times[first], self._times[-1]
        elapsed = max(now - began, 1e-9)
        speed = (tokens - first_tokens) / elapsed
        found = {
            "tokens_per_second": speed,
            "seconds_left": (self.total - step) * elapsed / max(1, step - first_step),
        }
        if self.peak_flops and self.flops_per_token:
            found["share_of_peak"] = speed * self.flops_per_token / self.peak_flops
        return found

    def say(self, record: dict[str, Any]) -> None:
        """One line about a record of the metrics."""
        parts = [f"step {record['step']}/{self.total}"]
        for name, form in (("loss", "loss {:.4f}"), ("learning_rate", "lr {:.2e}"), ("kl", "kl {:.4f}"),
                           ("nll", "nll {:.4f}"), ("hidden", "hidden {:.4f}"), ("validation", "validation {:.4f}"),
                           ("tokens_per_second", "{:.0f} tokens/s"), ("share_of_peak", "{:.0%} of peak")):  # fmt: skip
            if record.get(name) is not None:
                parts.append(form.format(record[name]))
        parts += [
            f"{name.removeprefix('ppl:')} ppl {value:.2f}" for name, value in record.items() if name[:4] == "ppl:"
        ]
        if record.get("seconds_left") is not None:
            parts.append(f"{seconds(record['seconds_left'])} left")
        self.progress.say("  ".join(parts))


def check_trackers(report_to: str | None) -> list[str]:
    """The trackers asked for, as the Trainer knows them.

    Raises:
        UsageError: one is unknown or not installed.
    """
    import importlib.util

    names = [name.strip() for name in (report_to or "").split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in _TRACKERS:
            raise UsageError(f"--report-to {name}: unknown", hint=f"known: {', '.join(_TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"--report-to {name}: the package is not installed", hint=f"pip install {name}")
    return names


def plot_losses(metrics: Sequence[dict[str, Any]], path: Path, title: str) -> bool:
    """Draw training and validation loss over steps into a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label, style in (("loss", "training", "-"), ("validation", "validation", "o-")):
        points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss (nats per predicted token)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    figure.savefig(path, dpi=150)
    return True


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second that the device reaches in one large matrix product, the best of a few. Half a second."""
    import torch

    size = 4096 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        _ = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
