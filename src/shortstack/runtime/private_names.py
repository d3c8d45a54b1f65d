"""What shortstack takes of torch, transformers, accelerate and PEFT that their documentation does not promise to keep.

Each such name is in here alone, in a function that gives it, or refuses a version without it in a sentence: which package
lacks what, which version is installed, which is known to have it, and what to type. Where the documented name does the
same, that is used and the name is not in here.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from shortstack.errors import ShortstackError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

# The versions that the tests run with (constraints.txt).
KNOWN = {"torch": "2.13.0", "transformers": "5.17.0", "accelerate": "1.15.0", "peft": "0.21.2"}

# Methods of the Trainer that are overridden, with the parameters that they are called with.
_HOOKS = {
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "_save_checkpoint": ("model", "trial"),
    "_save": ("output_dir", "state_dict"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
}
# What the Trainer's own constructor sets.
_TRAINER_STATE = ("accelerator", "callback_handler", "is_fsdp_enabled", "model_accepts_loss_kwargs", "model_wrapped")
_CONVERSION = ("WeightConverter", "WeightRenaming", "dot_natural_key", "rename_source_key", "revert_weight_conversion")


def lacking(name: str, what: str) -> ShortstackError:
    """The error that says which package lacks a name that something needs.

    Args:
        name: in full, beginning with the package.
        what: what needs it.
    """
    import importlib.metadata

    package = name.partition(".")[0]
    known = KNOWN[package]
    return ShortstackError(
        f"{package} {importlib.metadata.version(package)} has no {name.partition('.')[2]}, which {what} needs; "
        f"{package} {known} has it",
        hint=f"pip install {package}=={known}",
    )


def _taken(name: str, what: str) -> Any:
    """What is under a name, given as MODULE.ATTRIBUTE or MODULE.CLASS.ATTRIBUTE.

    Raises:
        ShortstackError: the installed version has no such module, or no such attribute in it.
    """
    place, _, attribute = name.rpartition(".")
    module, _, kind = place.rpartition(".") if place.rpartition(".")[2][0].isupper() else (place, "", "")
    try:
        found = importlib.import_module(module)
        return getattr(getattr(found, kind) if kind else found, attribute)
    except (ImportError, AttributeError):
        raise lacking(name, what) from None


# ---- torch


def fake_tensors() -> AbstractContextManager[Any]:
    """Within, tensors that are loaded have a shape, a type and a place in their file, and no bytes."""
    mode = _taken("torch._subclasses.fake_tensor.FakeTensorMode", "reading .bin files without running what is in them")
    return cast(AbstractContextManager[Any], mode())


def place_in_file(tensor: torch.Tensor) -> int:
    """The byte at which the storage of a tensor begins in the file that it was loaded from, within `fake_tensors`."""
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise lacking("torch.UntypedStorage._checkpoint_offset", "reading .bin files")
    return int(start)


def has_onednn() -> bool:
    """Whether oneDNN's products can be called by themselves."""
    import torch

    names = ("_linear_pointwise", "_reorder_linear_weight")
    return bool(torch.backends.mkldnn.is_available()) and all(  # type: ignore[no-untyped-call]
        hasattr(torch.ops.mkldnn, name) for name in names
    )


def check_onednn() -> None:
    """Refuse a version of torch that has oneDNN, but not its products by themselves."""
    import torch

    for name in ("_linear_pointwise", "_reorder_linear_weight"):
        if torch.backends.mkldnn.is_available() and not hasattr(torch.ops.mkldnn, name):  # type: ignore[no-untyped-call]
            raise lacking(f"torch.ops.mkldnn.{name}", "--cpu-kernels onednn")


def onednn_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W' + b through oneDNN, in float32 on a CPU."""
    import torch

    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def onednn_order(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A weight in the order that oneDNN multiplies so many rows with fastest."""
    import torch

    result: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return result


@contextlib.contextmanager
def compiled_whole(recompilations: int) -> Iterator[None]:
    """Within, what cannot be compiled in so many attempts is an error, instead of a run that is not compiled."""
    what = "bench --engine compiled"
    patch = _taken("torch._dynamo.config.patch", what)
    limits = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    for limit in limits:
        _taken(f"torch._dynamo.config.{limit}", what)
    with patch(**dict(zip(limits, (recompilations, recompilations, True), strict=True))):
        yield


# ---- transformers


def compile_everywhere(config: Any) -> None:
    """Let `generate` compile on a CPU, too, which it does on GPUs alone."""
    if not hasattr(config, "_compile_all_devices"):
        raise lacking("transformers.CompileConfig._compile_all_devices", "bench --engine compiled on a CPU")
    config._compile_all_devices = True


@dataclass(frozen=True)
class ConversionRules:
    """transformers' rules from tensors as they are stored to parameters as they are computed with.

    Attributes:
        mapping: model -> its rules.
        converter, renaming: the kinds of rules.
        sort_key: of names, by the numbers in them.
        rename: a stored name -> the parameter's.
        revert: parameters -> stored tensors.
    """

    mapping: Callable[..., Any]
    converter: type[Any]
    renaming: type[Any]
    sort_key: Callable[[str], Any]
    rename: Callable[..., Any]
    revert: Callable[..., Any]


def conversion_rules() -> ConversionRules:
    """The functions that transformers converts whole checkpoints with when it loads them."""
    what = "reading weights block by block"
    mapping = _taken("transformers.conversion_mapping.get_model_conversion_mapping", what)
    found = [_taken(f"transformers.core_model_loading.{name}", what) for name in _CONVERSION]
    for method in ("add_tensor", "convert"):
        _taken(f"transformers.core_model_loading.WeightConverter.{method}", what)
    return ConversionRules(mapping, *found)


def ignored_patterns(model: Any) -> list[str]:
    """Patterns of the stored tensors that a model of transformers has no use for."""
    if not hasattr(model, "_keys_to_ignore_on_load_unexpected"):
        name = "transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected"
        raise lacking(name, "reading weights block by block")
    return sorted(model._keys_to_ignore_on_load_unexpected or ())


def own_key_mapping(model: Any) -> dict[str, str]:
    """What the names in an older adapter became in this model; most models rename nothing and do not have this."""
    return dict(getattr(model, "_checkpoint_conversion_mapping", {}))


def initialize_again(model: Any, modules: list[Any]) -> None:
    """Let a model of transformers compute again what these modules hold besides parameters."""
    if not hasattr(model, "initialize_weights"):
        raise lacking("transformers.PreTrainedModel.initialize_weights", "computing rotary tables")
    for module in modules:
        module._is_hf_initialized = False
    model.initialize_weights()


def check_trainer_class(trainer: type) -> None:
    """Refuse a Trainer without the methods that are overridden: nothing would call ours, and nobody would be told."""
    for name, parameters in _HOOKS.items():
        method = getattr(trainer, name, None)
        if method is None or not {*parameters} <= {*inspect.signature(method).parameters}:
            raise lacking(f"transformers.Trainer.{name}({', '.join(parameters)})", "retraining")


def check_trainer(trainer: Any) -> None:
    """Refuse a Trainer that does not have the state that our methods read or set."""
    for name in _TRAINER_STATE:
        if not hasattr(trainer, name):
            raise lacking(f"transformers.Trainer.{name}", "retraining")


def state_file_names() -> tuple[str, str]:
    """The files in which the Trainer stores the optimizer and the schedule of the learning rate."""
    optimizer, schedule = (
        _taken(f"transformers.trainer.{name}", "retraining") for name in ("OPTIMIZER_NAME", "SCHEDULER_NAME")
    )
    return str(optimizer), str(schedule)


# ---- accelerate


def forget_processes() -> None:
    """Let accelerate forget the processes that trained together: another run in them begins as the first one did."""
    reset = _taken("accelerate.state.AcceleratorState._reset_state", "retraining in several processes")
    reset(reset_partial_state=True)


def shard_on_cpu() -> None:
    """Let accelerate shard on the CPU, too, which it does on accelerators only: for trying a run out without any."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if "distributed_type" not in getattr(PartialState, "_shared_state", {}):
        raise lacking("accelerate.PartialState._shared_state['distributed_type']", "FSDP on a CPU")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


# ---- PEFT


def adapter_layer() -> type[Any]:
    """The class of PEFT's layers that stand in the place of a layer of the model."""
    return cast(type[Any], _taken("peft.tuners.tuners_utils.BaseTunerLayer", "LoRA"))


def adapter_tuner() -> type[Any]:
    """The class of PEFT's models that put adapters beside weights."""
    return cast(type[Any], _taken("peft.tuners.tuners_utils.BaseTuner", "folding an adapter in"))
