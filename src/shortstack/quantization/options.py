"""The options of quantization: the text that it is calibrated on, and how the run goes."""

from __future__ import annotations

from dataclasses import dataclass

from shortstack.checkpoint.tokenizer_files import TokenizerOptions
from shortstack.common.option_values import Listed
from shortstack.data.calibration import Sampling


@dataclass(frozen=True)
class CalibrationText:
    """The windows of text that show what each layer's inputs look like.

    Attributes:
        data: where calibration text comes from: `embedded`, a .txt, .jsonl, .json or .parquet file, a folder, or a set on
            the hub such as `c4`.
        samples: number of calibration windows.
        seq_len: tokens per window; by default 2048, or as many as the model has positions.
        seed: of the generator that draws the windows.
        sampling: `joined` joins the first 5000 rows by blank lines and draws windows anywhere in them, as published for
            GPTQ on C4; `documents` draws windows from documents that are long enough, or from joined rows; `published` is
            the procedure of Shortened LLaMA for its scores.
        chat_template: render rows of `messages` through the tokenizer's chat template.
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
        eval_data: texts, separated by commas, whose perplexity is measured before and after (windows of 128, as published);
            `none` measures nothing.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        force: replace an output that shortstack made before.
        trust_remote_code: run code that comes with the checkpoint.
        allow_links: follow links in the checkpoint that lead out of its directory.
        quiet: no progress on stderr.
    """

    eval_data: Listed = "embedded"
    device: str = "auto"
    force: bool = False
    trust_remote_code: bool = False
    allow_links: bool = False
    quiet: bool = False
