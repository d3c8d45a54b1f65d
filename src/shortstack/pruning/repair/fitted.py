"""A pruned checkpoint and its dense model -> the repairs that were chosen, on windows of text; nothing is written."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint.anatomy import Residual
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.phases import phase
from shortstack.common.progress import Progress
from shortstack.common.source_names import SELF
from shortstack.data.calibration import CalibrationOptions, CalibrationSet, check_windows
from shortstack.data.embedded import say_of_own_text
from shortstack.errors import ShortstackError
from shortstack.families.open_model import check_pair
from shortstack.pruning.repair.options import VALIDATION_SHARE, Method, RepairOptions
from shortstack.pruning.repair.places import Place, named, places_of, residual_of
from shortstack.runtime.devices import pick_device, pick_scoring_dtype
from shortstack.runtime.libraries import import_transformers
from shortstack.scoring.options import ScoreOptions
from shortstack.scoring.score import calibration_windows

if TYPE_CHECKING:
    import torch

    from shortstack.engine.select import EngineOptions
    from shortstack.engine.streamed import StreamedModel
    from shortstack.pruning.repair.sweep import Repaired, Repairing

_FEWEST_VALIDATION = 2


@dataclass(frozen=True)
class Fitted:
    """What was chosen, and the windows that chose it.

    Attributes:
        repaired: what was done at each place.
        residual: where it is folded.
        dense_nll, pruned_nll: mean NLL on the validation windows.
        nll: the same with all repairs, before they are folded.
        validation: those windows.
        calibration: what the record says of all windows.
        engine: how the models are run.
    """

    repaired: tuple[Repaired, ...]
    residual: Residual
    dense_nll: float
    pruned_nll: float
    nll: float
    validation: Sequence[Sequence[int]]
    calibration: dict[str, Any]
    engine: EngineOptions


def check_repairable(dense: Checkpoint, pruned: Checkpoint, method: Method, repair: RepairOptions) -> list[Place]:
    """Look at whether there is something to repair and a place for it, before any text is read.

    Raises:
        ShortstackError: there is not.
    """
    check_pair(dense, pruned)
    residual = check_family(pruned, method)
    found = places_of(dense, pruned, 0 if residual.norms else repair.behind_with(method))
    places = [place for place in found if place.removed or _possible(place, method)]
    possible = [place for place in places if _possible(place, method)]
    if not possible:
        where = "no block comes after it" if method == "scale" else "no block comes before it"
        raise ShortstackError(
            f"{pruned.source}: the repair `{method}` cannot repair the cut of {places[0].name}: {where}",
            hint=f"take `{'linear' if method == 'scale' else 'scale'}`",
        )
    return places


def check_family(checkpoint: Checkpoint, method: Method) -> Residual:
    """Where the family has its places for a repair.

    Raises:
        ShortstackError: it has none, or none for this method; or the checkpoint is quantized.
    """
    if "quantization_config" in checkpoint.config:
        raise ShortstackError(
            f"{checkpoint.source}: is quantized; repairs need full-precision weights",
            hint="repair before quantizing",
        )
    residual = residual_of(checkpoint)
    if residual.norms and method in ("linear", "full"):
        family = checkpoint.anatomy.family.model_type
        raise ShortstackError(
            f"{checkpoint.source}: the repair `{method}` cannot be folded into {family} models: a norm follows each MLP",
            hint="`scale` is folded into those norms; `auto` uses it where it helps",
        )
    return residual


def _possible(place: Place, method: Method) -> bool:
    """Whether a method can do something at a place: a factor needs blocks behind it, a linear map one before it."""
    scales, maps = bool(place.removed) and not place.is_last, place.position >= 0
    return {"scale": scales, "linear": maps, "full": maps, "auto": scales or maps}[method]


@phase("repairing")
def fitted(
    dense: Checkpoint,
    pruned: Checkpoint,
    method: Method,
    calibration: CalibrationOptions,
    repair: RepairOptions,
    options: ScoreOptions,
    progress: Progress,
) -> Fitted:
    """Choose the repairs of every cut.

    Raises:
        ShortstackError: a repair has no place, there is too little text, or states are not finite.
    """
    places = check_repairable(dense, pruned, method, repair)
    residual = residual_of(pruned)
    drawn, fitting = drawn_windows(dense, pruned, calibration, options, progress)
    import_transformers()
    from shortstack.engine.cpu import computing
    from shortstack.pruning.repair.sweep import described

    device = pick_device(options.device)
    stored = dense.tensors[dense.anatomy.embedding].dtype
    how = _engine_options(
        pick_scoring_dtype(options.dtype, stored, device, say=progress.say), device, options, progress
    )
    found: list[Repaired] = []
    with contextlib.ExitStack() as using:
        models = [using.enter_context(contextlib.closing(opened(one, how))) for one in (dense, pruned)]
        using.enter_context(computing(how.dtype, device, options.cpu_kernels))
        repairing = _repairing(models, pruned, residual, drawn.windows, fitting, method, repair, progress)
        for repaired in repairing.repaired(places):
            progress.say(described(repaired))
            found.append(repaired)
        dense_nll = float(repairing.dense_nll().mean())
    _say_left_out(places, method, progress)
    return Fitted(
        tuple(found), residual, dense_nll, found[0].nll["none"], found[-1].nll[found[-1].chosen.method],
        drawn.windows[fitting:], {**drawn.record, "fitted_on": fitting, "chosen_on": len(drawn.windows) - fitting}, how,
    )  # fmt: skip


def drawn_windows(
    dense: Checkpoint, pruned: Checkpoint, calibration: CalibrationOptions, options: ScoreOptions, progress: Progress
) -> tuple[CalibrationSet, int]:
    """The windows, and how many of them, the first ones, are fitted on; the others choose.

    With `self:PROMPTS` the dense model writes them, not the pruned one.

    Raises:
        ShortstackError: there is too little text.
    """
    fitting = calibration.samples
    choosing = max(_FEWEST_VALIDATION, -(-fitting // VALIDATION_SHARE))
    written = SELF in calibration.data
    drawn = calibration_windows(
        replace(dense, tokenizer=pruned.tokenizer) if written else pruned,
        replace(calibration, samples=fitting + choosing),
        options=options,
        progress=progress,
    ).taking_turns()
    texts = max(1, len(drawn.places))  # named sources, each of which has as many
    fitting, choosing = fitting * texts, choosing * texts
    check_windows(pruned, drawn.windows)
    progress.say(
        f"repairs are fitted on {fitting} windows of {len(drawn.windows[0])} tokens of {calibration.data}, and chosen on "
        f"{choosing} others"
    )
    say_of_own_text(pruned, calibration.data, "the repair can make the model worse on other text", progress)
    return drawn, fitting


def opened(checkpoint: Checkpoint, how: EngineOptions) -> StreamedModel:
    """A model whose blocks are run one at a time.

    Raises:
        ShortstackError: they cannot be.
    """
    from shortstack.engine.select import open_blocks

    return open_blocks(checkpoint, how)


def _engine_options(
    dtype: torch.dtype, device: torch.device, options: ScoreOptions, progress: Progress
) -> EngineOptions:
    from shortstack.engine.select import EngineOptions

    return EngineOptions(dtype, device, options.memory, trust_remote_code=options.trust_remote_code, say=progress.say)


def _repairing(
    models: Sequence[StreamedModel],
    pruned: Checkpoint,
    residual: Residual,
    windows: Sequence[Sequence[int]],
    fitting: int,
    method: Method,
    repair: RepairOptions,
    progress: Progress,
) -> Repairing:
    from shortstack.engine.interface import Windows
    from shortstack.pruning.repair.states import States, parameters_of
    from shortstack.pruning.repair.sweep import Repairing

    swept = Windows.of(windows, models[0].device)
    stored = [[] if residual.norms else named(pruned, block, residual.mlp) for block in range(pruned.depth)]
    return Repairing(
        dense=States(models[0], swept),
        pruned=States(models[1], swept),
        fitted_WT=_fitted_tokens(swept.ids_WT, fitting, pruned, repair),
        fitting=fitting,
        methods=("none", "scale", "linear", "full") if method == "auto" else (method,),
        parameters=[parameters_of(models[1], block, tensors) for block, tensors in enumerate(stored)],
        offset=any(tensor.name.endswith(".bias") for tensor in stored[0]),
        progress=progress,
    )


def _fitted_tokens(ids_WT: torch.Tensor, fitting: int, pruned: Checkpoint, repair: RepairOptions) -> list[torch.Tensor]:
    """Which tokens maps are fitted on, [W, T]; the first ones apart, where maps are fitted without them and with them."""
    import torch

    fitted_WT = torch.zeros_like(ids_WT, dtype=torch.bool)
    fitted_WT[:fitting] = True
    padding = pruned.anatomy.family.text(pruned.config).get("pad_token_id")
    if not repair.padding and isinstance(padding, int):
        behind_WT = (ids_WT != padding).flip(1).cummax(dim=1).values.flip(1)  # True up to the last token that is text
        fitted_WT &= behind_WT
    first_WT = fitted_WT.clone()
    first_WT[:, 1:] = False
    if not repair.first_token:
        fitted_WT &= ~first_WT
    if not bool(fitted_WT.any()):
        raise ShortstackError("no token of the windows is left to fit on", hint="use --first-token, or longer windows")
    return [fitted_WT, first_WT] if repair.first_token is None else [fitted_WT]


def _say_left_out(places: Sequence[Place], method: Method, progress: Progress) -> None:
    left_out = [place.name for place in places if place.removed and not _possible(place, method)]
    if left_out:
        progress.say(f"the repair `{method}` cannot repair the cut of {', '.join(left_out)}, which is left unchanged")
