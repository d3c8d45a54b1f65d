"""A gate on each block's update: the output is what came in, plus the gate times what the block adds. All gates are 1.

The gradient of the loss over the gates comes from one forward and one backward sweep, a block at a time: at a block it is
the product of what its output's gradient is and what the block adds. Weights need no gradients.

Legend: S settings of the gates, W windows, T tokens, D hidden size, N blocks, R rows (windows of settings).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from shortstack.engine.block_model import BlockCall, Skeleton
from shortstack.engine.block_weights import BlockWeights
from shortstack.engine.forward import embedded
from shortstack.engine.interface import GateSetting, Windows
from shortstack.engine.losses import gradient_of
from shortstack.runtime.devices import exact_place


def gate_gradients(
    weights: BlockWeights, windows: Windows, settings: Sequence[GateSetting], scale_W: torch.Tensor
) -> torch.Tensor:
    """d (sum over windows of scale * the window's summed NLL) / d gates, at each setting, [S, N], float64, on the CPU.

    Below the lowest gate that any setting changes nothing is computed, and zeros are given: a second derivative is the same
    in both orders.

    Args:
        settings: the gates that are not 1.
        scale_W: of each window.
    """
    skeleton, rows = weights.skeleton, windows.repeated(len(settings))
    depth, count, ids_WT, ids_RT = len(skeleton.blocks), len(settings), windows.ids_WT, rows.ids_WT
    first = min((min(setting) if setting else 0 for setting in settings), default=0)
    gates_NR = _gates(settings, depth, len(windows)).to(ids_WT.device, skeleton.dtype)
    hidden_RTD, inputs = embedded(skeleton, ids_WT), []
    for index, block in weights.each(range(depth)):
        if index == first:
            hidden_RTD = hidden_RTD.repeat(count, *[1] * (hidden_RTD.ndim - 1))
        if index >= first:
            inputs.append(hidden_RTD)
        hidden_RTD = _through(skeleton, block, index, hidden_RTD, ids_WT if index < first else ids_RT, gates_NR[index])
    with torch.enable_grad():
        gradient_RTD = skeleton.head.nll_gradient(hidden_RTD, ids_RT, scale_W.repeat(count), rows.counted_WT)
    found_NR = torch.zeros(depth, len(ids_RT), dtype=torch.float64)
    for index, block in weights.each(range(depth - 1, first - 1, -1)):
        for part, call in _parts(skeleton, ids_RT, index):
            given = inputs[index - first][part].detach().requires_grad_(index > first)
            with torch.enable_grad():
                result = skeleton.run_block(block, given, call)
            gradient, gate = gradient_RTD[part], _wide(gates_NR[index, part], given)
            sums_N = (gradient * (result.detach() - given.detach())).flatten(1).sum(dim=1)
            found_NR[index, part] = exact_place(sums_N).double().cpu()
            if index > first:
                torch.autograd.backward(result, gradient * gate)
                gradient_RTD[part] = gradient_of(given) + gradient * (1 - gate)
        inputs[index - first] = torch.empty(0)
    return found_NR.view(depth, count, -1).sum(dim=-1).T


def _gates(settings: Sequence[GateSetting], depth: int, windows: int) -> torch.Tensor:
    """[N, R]: those of every window of every setting."""
    gates_NSW = torch.ones(depth, len(settings), windows)
    for number, setting in enumerate(settings):
        for place, gate in setting.items():
            gates_NSW[place, number] = gate
    return gates_NSW.flatten(1)


def _through(
    skeleton: Skeleton,
    block: nn.Module,
    index: int,
    hidden_RTD: torch.Tensor,
    ids_RT: torch.Tensor,
    gates_R: torch.Tensor,
) -> torch.Tensor:
    """The output of a block; before settings differ the gates are those of the first windows, which are 1."""
    following_RTD = torch.empty_like(hidden_RTD)
    for part, call in _parts(skeleton, ids_RT, index):
        given = hidden_RTD[part]
        update = skeleton.run_block(block, given, call) - given
        following_RTD[part] = given + _wide(gates_R[part], given) * update
    return following_RTD


def _parts(skeleton: Skeleton, ids_RT: torch.Tensor, index: int) -> list[tuple[slice, BlockCall]]:
    rows = skeleton.rows_at_a_time(ids_RT)
    slices = [slice(start, min(start + rows, len(ids_RT))) for start in range(0, len(ids_RT), rows)]
    return [(part, skeleton.calls(ids_RT[part])[index]) for part in slices]


def _wide(gates_R: torch.Tensor, hidden_RTD: torch.Tensor) -> torch.Tensor:
    return gates_R.view(-1, *[1] * (hidden_RTD.ndim - 1))
