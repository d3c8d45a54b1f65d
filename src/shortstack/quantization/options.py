"""The options of quantization: the text that it is calibrated on, and how the run computes."""

from __future__ import annotations

from dataclasses import dataclass

from shortstack.checkpoint.options import CheckpointOptions
from shortstack.common.option_values import Listed
from shortstack.common.options import Options
from shortstack.data.calibration import Sampling


@dataclass(frozen=True)
class CalibrationText(Options):
    """The calibration windows, which give each layer's inputs.

    Attributes:
        data: The source of the calibration text: `embedded`, a .txt, .jsonl, .json or .parquet file, a folder, or a
            data set on the hub such as `c4`.
        samples: The number of calibration windows.
        seq_len: The number of tokens in a calibration window. By default it is 2048, or as many as the model has
            positions.
        seed: The seed of the generator that draws the calibration windows.
        sampling: How the windows are drawn: `joined` draws them anywhere in the first 5000 rows joined by blank lines,
            as published for GPTQ on C4; `documents` draws them from documents that are long enough, or from joined
            rows; `published` draws them as Shortened LLaMA does for its scores.
        chat_template: Render rows of `messages` through the tokenizer's chat template.
    """

    data: str = "embedded"
    samples: int = 128
    seq_len: int | None = None
    seed: int = 0
    sampling: Sampling = "documents"
    chat_template: bool = False


@dataclass(frozen=True)
class QuantizeOptions(CheckpointOptions):
    """How a quantization runs.

    Attributes:
        eval_data: Measure the perplexity of these texts before and after, separated by commas (windows of 128, as
            published). `none` skips this.
        device: The device to compute on: `cpu`, `cuda` or `cuda:N`. `auto` is CUDA if available, else the CPU.
        force: Replace an existing output that shortstack made.
    """

    eval_data: Listed = "embedded"
    device: str = "auto"
    force: bool = False
