"""Load a whole checkpoint through transformers, with errors that say what to do, and run it over batches."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shortstack.checkpoint.headers import adapter_files
from shortstack.checkpoint.reader import Checkpoint, read_config
from shortstack.common.extras import need_packages
from shortstack.common.json_fields import nested
from shortstack.common.phases import is_watched, phase
from shortstack.errors import ShortstackError, first_line, system_reason
from shortstack.runtime.devices import DType, pick_device, pick_dtype
from shortstack.runtime.libraries import import_transformers
from shortstack.runtime.memory import available_bytes

if TYPE_CHECKING:
    import torch


@phase("loading the model")
def from_directory(
    directory: Path, *, dtype: torch.dtype | Literal["auto"], trust_remote_code: bool = False, **how: Any
) -> tuple[Any, dict[str, Any]]:
    """The one way in which a whole model comes into memory; what transformers raises is raised.

    Args:
        directory: the checkpoint.
        dtype: of its weights; `auto` is the checkpoint's own.
        trust_remote_code: run code that comes with the checkpoint.
        **how: what else `from_pretrained` is told, such as `device_map`.

    Returns:
        (model in evaluation mode, what transformers says of missing and unexpected keys).

    Raises:
        UsageError: it is quantized, and the package that reads it is not installed.
    """
    is_compressed = _is_compressed(directory)
    if is_compressed:
        need_packages(f"{directory}: is quantized; loading it", "compressed_tensors")
    import_transformers()
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), own_weights(directory) as own, _decompressing(is_compressed) as more:
        model, info = AutoModelForCausalLM.from_pretrained(
            own,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **experts_for(dtype),
            **more,
            **how,
        )
    if is_compressed:  # weights have the type that their scales are stored in
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.dtype != model.dtype:
                parameter.data = parameter.data.to(model.dtype)
    model.config.name_or_path = str(directory)
    return model.eval(), info


def load_with_transformers(
    checkpoint: Checkpoint, *, dtype: torch.dtype, trust_remote_code: bool = False
) -> tuple[Any, dict[str, Any]]:
    """(model on the CPU in evaluation mode, what transformers says of missing and unexpected keys).

    Raises:
        ShortstackError: transformers cannot load it.
    """
    try:
        return from_directory(checkpoint.directory, dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, RuntimeError, OSError, KeyError, ImportError) as error:
        raise ShortstackError(f"{checkpoint.source}: transformers cannot load it: {first_line(error)}") from None


def load_whole(checkpoint: Checkpoint, *, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """The whole model on the CPU, in evaluation mode.

    Raises:
        ShortstackError: transformers cannot load it, or would invent weights.
    """
    model, info = load_with_transformers(checkpoint, dtype=dtype, trust_remote_code=trust_remote_code)
    refuse_missing(checkpoint, info)
    return model


def refuse_missing(checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    """Refuse a model with weights that transformers did not find.

    Raises:
        ShortstackError: there are such.
    """
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ShortstackError(
            f"{checkpoint.source}: the weights lack {missing[0]!r} ({len(missing)}), which would be random"
        )


def _is_compressed(directory: Path) -> bool:
    with contextlib.suppress(ShortstackError):  # links were looked at when the checkpoint was opened
        return bool(
            nested(read_config(directory, allow_links=True)[0], "quantization_config", "quant_method")
            == "compressed-tensors"
        )
    return False


@contextlib.contextmanager
def _decompressing(is_compressed: bool) -> Iterator[dict[str, Any]]:
    """Within, what else transformers is told so that the weights of a compressed-tensors checkpoint become plain ones when
    they are loaded, without progress bars. Left to itself the library does that when the model first runs.
    """
    if not is_compressed:
        yield {}
        return
    from transformers import CompressedTensorsConfig

    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the checkpoint has a quantization_config, too
        yield {"quantization_config": CompressedTensorsConfig(dequantize=True)}


@contextlib.contextmanager
def own_weights(directory: Path) -> Iterator[Path]:
    """What transformers may load a checkpoint from: the directory; where an adapter's files lie beside the weights, a folder
    of links to all the others, because transformers would put the adapter on top of the weights.

    Raises:
        ShortstackError: links cannot be made here.
    """
    beside = adapter_files(directory)
    if not beside:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="shortstack-") as folder:
        try:
            for path in directory.iterdir():
                if path.name not in beside:
                    (Path(folder) / path.name).symlink_to(path.absolute())
        except OSError as error:
            raise ShortstackError(
                f"{directory}: holds an adapter beside its weights, and links to the weights alone cannot be made "
                f"({system_reason(error)})",
                hint=f"move {', '.join(beside)} to another directory",
            ) from None
        yield Path(folder)


def aligned(model: Any) -> Any:
    """The same model with every weight moved to memory of the allocator's alignment.

    transformers maps weights where they lie in the file, at any multiple of their size; some CPUs then add up the
    products of experts in another order, and two models with equal weights differ in the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def experts_for(dtype: torch.dtype | Literal["auto"]) -> dict[str, str]:
    """How mixtures of experts are to be computed: the fused products that transformers prefers know no float64."""
    return {"experts_implementation": "eager"} if str(dtype) == "torch.float64" else {}


@phase("loading the model")
def load_model(
    checkpoint: Checkpoint, *, dtype: DType, device: str, trust_remote_code: bool = False
) -> tuple[Any, torch.dtype, torch.device]:
    """A whole model that is ready to run: (model in evaluation mode, dtype, device).

    Raises:
        ShortstackError: it does not fit, or transformers cannot load it without inventing weights.
    """
    import torch

    place = pick_device(device)
    computed = pick_dtype(dtype, checkpoint.tensors[checkpoint.anatomy.embedding].dtype, place)
    needed = checkpoint.parameters() * torch.empty(0, dtype=computed).element_size()
    free = available_bytes(place)
    if needed > free:
        raise ShortstackError(
            f"{checkpoint.source}: {needed / 1e9:.1f} GB of weights in {computed}, {free / 1e9:.1f} GB free on {place}",
            hint="--dtype bfloat16 needs half as much memory",
        )
    model = load_whole(checkpoint, dtype=computed, trust_remote_code=trust_remote_code)
    return model.to(place), computed, place


def losses_over(
    model: Any,
    batches: Iterable[dict[str, Any]],
    loss: Callable[[Any, dict[str, Any]], torch.Tensor],
    device: torch.device,
) -> list[torch.Tensor]:
    """What `loss` gives of each batch: the loop of every measurement. No gradients, the model in evaluation mode.

    Args:
        model: left in the mode that it was in.
        batches: tensors by name, on any device; made as they are needed.
        loss: given the model and a batch.
        device: where the model is.
    """
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return [
                loss(model, {key: value.to(device) for key, value in batch.items() if hasattr(value, "to")})
                for batch in batches
            ]
    finally:
        model.train(was_training)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within: no progress bars and no warnings about keys, which are checked by the callers; with `--verbose` they show."""
    if is_watched():
        yield
        return
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
