"""The options of exports that call a program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ConverterOptions:
    """The converter, and how it runs.

    Attributes:
        converter: llama.cpp's convert_hf_to_gguf.py, or the folder that holds it; by default it is looked for on PATH, and
            as a package.
        converter_python: the Python that runs it, such as VENV/bin/python; alone, that of an environment with the package
            convert-hf-to-gguf. By default what the environment variable SHORTSTACK_CONVERTER_PYTHON names, or the environment
            `convert` in the folder that SHORTSTACK_ENGINES names.
        time_limit: seconds that the converter may take.
        force: replace an existing file.
        trust_remote_code: convert checkpoints that hold code, which the converter may run.
        allow_links: follow links in the checkpoint that lead out of its directory.
        quiet: no progress on stderr.
    """

    converter: Path | None = None
    converter_python: Path | None = None
    time_limit: float = 3600.0
    force: bool = False
    trust_remote_code: bool = False
    allow_links: bool = False
    quiet: bool = False
