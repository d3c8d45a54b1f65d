"""Fold an adapter into the checkpoint it was trained on: a plain checkpoint that loads everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.artifacts.provenance import versions
from shortstack.checkpoint.adapter import read_adapter_config
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.clock import command_seconds
from shortstack.common.formatting import seconds
from shortstack.common.options import stage
from shortstack.common.progress import Progress
from shortstack.common.shown import Shown
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_model
from shortstack.retraining.options import SaveDType
from shortstack.runtime.atomic_output import published
from shortstack.runtime.hashes import file_sha256


@dataclass(frozen=True, repr=False)
class MergeResult(Shown):
    """The adapter, its base and the merged checkpoint.

    Attributes:
        out: The new checkpoint.
        adapter: The adapter that was folded in.
        base: The checkpoint that it was folded into.
        seconds: The wall-clock time in seconds.
    """

    out: Path
    adapter: Path
    base: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "schema": 1, "out": str(self.out), "adapter": str(self.adapter), "base": self.base, "seconds": self.seconds
        }  # fmt: skip

    def to_text(self) -> str:
        """What a person reads on the terminal."""
        return f"{self.out}: {self.adapter} folded into {self.base} in {seconds(self.seconds)}"


@stage
def merge(
    adapter: Path,
    *,
    out: Path,
    base: str | None = None,
    save_dtype: SaveDType | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    allow_links: bool = False,
    quiet: bool = False,
) -> MergeResult:
    """Fold a PEFT adapter into its base checkpoint, and write a plain checkpoint.

    Each weight becomes W + scale * B A, computed in float32 and rounded once to the type that W is stored in. Before
    the output is written, its logits are compared with those of base and adapter.

    Args:
        adapter: The adapter's directory.
        out: Write the checkpoint to this directory.
        base: The checkpoint that the adapter was trained on. By default it is the one that adapter_config.json names.
        save_dtype: The data type to store the result in. By default each tensor keeps its type in the base.
        force: Replace an existing output that shortstack made.
        trust_remote_code: Run the Python code that comes with the checkpoint.
        allow_links: Follow symbolic links in the base that lead out of its directory.
        quiet: Show no progress on stderr.

    Returns:
        What was merged.

    Raises:
        ShortstackError: it is not an adapter, or does not fit the base.
    """
    adapter = Path(adapter)
    named = read_adapter_config(adapter).get("base_model_name_or_path")
    if base is None and not named:
        raise ShortstackError(
            f"{adapter}: does not record which checkpoint it was trained on", hint="name it with --base MODEL"
        )
    progress = Progress(quiet=quiet)
    checkpoint = _opened(adapter, base or str(named), base is not None, allow_links, progress)
    step = {
        "stage": "merge",
        "source": checkpoint.source,
        "fingerprint": checkpoint.fingerprint,
        "adapter": str(adapter),
        "adapter_sha256": file_sha256(_weights(adapter)),
        "versions": versions("peft"),
    }
    nbytes = checkpoint.nbytes + checkpoint.tensors[checkpoint.anatomy.embedding].nbytes  # a tie may come undone
    with published(out, inputs=[checkpoint.directory, adapter], nbytes=nbytes, force=force) as stage:
        from shortstack.retraining.export import write_checkpoint
        from shortstack.retraining.fold import merged_model

        model = merged_model(checkpoint, adapter, trust_remote_code=trust_remote_code, progress=progress)
        write_checkpoint(checkpoint, model, stage, step, save_dtype=save_dtype, progress=progress)
    return MergeResult(Path(out), adapter, checkpoint.source, command_seconds())


def _opened(adapter: Path, base: str, is_given: bool, allow_links: bool, progress: Progress) -> Checkpoint:
    try:
        return open_model(base, allow_links=allow_links, progress=progress)
    except ShortstackError as error:
        if is_given:
            raise
        raise ShortstackError(
            f"{adapter}: the base that it names cannot be opened: {error.message}",
            hint="give its current path with --base MODEL",
        ) from None


def _weights(adapter: Path) -> Path:
    found = next(
        (adapter / n for n in ("adapter_model.safetensors", "adapter_model.bin") if (adapter / n).is_file()), None
    )
    if found is None:
        raise ShortstackError(
            f"{adapter}: no weights (adapter_model.safetensors)", hint="download or copy the adapter again"
        )
    if found.suffix == ".bin":
        raise ShortstackError(
            f"{found}: a pickled adapter; merge reads safetensors only", hint="save it again with a current PEFT"
        )
    return found
