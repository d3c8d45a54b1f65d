"""The options of quantization: the text that it is calibrated on, and how the run goes."""

from __future__ import annotations

from dataclasses import dataclass

from shortstack.checkpoint.tokenizer_files import TokenizerOptions
from shortstack.common.option_values import Listed
from shortstack.common.options import Options
from shortstack.data.calibration import Sampling


@dataclass(frozen=True)
class CalibrationText(Options):
    """The windows of text that show what each layer's inputs look like.

    Attributes:
        data: The source of the calibration text: `embedded`, a .txt, .jsonl, .json or .parquet file, a folder, or a set
            on the hub such as `c4`.
        samples: The number of calibration windows.
        seq_len: The number of tokens in a calibration window. By default it is 2048, or as many as the model has
            positions.
        seed: The seed of the generator that draws the calibration windows.
        sampling: How the windows are drawn: `joined` draws them anywhere in the first 5000 rows joined by blank lines,
            as published for GPTQ on C4; `documents` draws them from documents that are long enough, or from joined
            rows; `published` is the procedure of Shortened LLaMA for its scores.
        chat_template: Render rows of `messages` through the tokenizer's chat template.
    """

    data: str = "embedded"
    samples: int = 128
    seq_len: int | None = None
    seed: int = 0
    sampling: Sampling = "documents"
    chat_template: bool = False


@dataclass(frozen=True)
class QuantizeOptions(TokenizerOptions):
    """How a quantization runs.

    Attributes:
        eval_data: Measure the perplexity of these texts before and after, separated by commas (windows of 128, as
            published). `none` measures nothing.
        device: Where to compute: `cpu`, `cuda` or `cuda:N`. `auto` takes CUDA, else the CPU.
        force: Replace an output that shortstack made before.
        trust_remote_code: Run code that comes with the checkpoint.
        allow_links: Follow links in the checkpoint that lead out of its directory.
        quiet: Show no progress on stderr.
    """

    eval_data: Listed = "embedded"
    device: str = "auto"
    force: bool = False
    trust_remote_code: bool = False
    allow_links: bool = False
    quiet: bool = False
