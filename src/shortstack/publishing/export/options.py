"""The options of exports that call a program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shortstack.common.options import Options


@dataclass(frozen=True)
class ConverterOptions(Options):
    """The converter, and how it runs.

    Attributes:
        converter: The converter: llama.cpp's convert_hf_to_gguf.py, or the folder that holds it. By default it is
            searched for on PATH, and as a package.
        converter_python: The Python that runs the converter, such as VENV/bin/python. Without `converter`, it is that
            of an environment with the package convert-hf-to-gguf. By default it is the one that the environment
            variable SHORTSTACK_CONVERTER_PYTHON names, or the environment `convert` in the folder that
            SHORTSTACK_ENGINES names.
        time_limit: The time limit of the converter in seconds.
        force: Replace an existing file.
        trust_remote_code: Convert checkpoints that contain code, although the converter may run it.
        allow_links: Follow symbolic links in the checkpoint that lead out of its directory.
        quiet: Show no progress on stderr.
    """

    converter: Path | None = None
    converter_python: Path | None = None
    time_limit: float = 3600.0
    force: bool = False
    trust_remote_code: bool = False
    allow_links: bool = False
    quiet: bool = False
