"""From logits to the negative log-likelihood of each token that is predicted.

Legend: B windows in a batch, T tokens, D hidden size, V vocabulary, R tokens of all windows.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from shortstack.engine.interface import slices
from shortstack.runtime.devices import exact_place
from shortstack.runtime.memory import return_free_memory

if TYPE_CHECKING:
    from shortstack.engine.block_model import Skeleton

# Logits held at once, float32. Below 32 MiB the allocator keeps the pages; where they are made in slices of the
# vocabulary, a slice is to stay in the cache.
_LOGITS_BYTES = 31 << 20
_SLICE = {"cpu": 5 << 19, "cuda": 1 << 27}
_CACHED_LOGITS = 1 << 18  # numbers of a piece
_NARROWER = 16  # columns
_SMALL = 4 << 20  # numbers; up to here a second copy costs less than the passes in place


Piece = tuple[slice, slice]  # which windows, and which of their tokens


def _pieces(whole: Piece, rows: int, columns: int) -> Iterator[Piece]:
    """Pieces of windows and tokens, of so many windows and tokens each."""
    return itertools.product(slices(whole[0], rows), slices(whole[1], columns))


def cached_pieces(whole: Piece, vocabulary: int, device: torch.device) -> Iterator[Piece]:
    """Pieces of windows and tokens whose logits stay in a CPU's cache while several things are made of them."""
    most = max(1, _CACHED_LOGITS // vocabulary) if device.type == "cpu" else sys.maxsize
    columns = min(whole[1].stop - whole[1].start, most)
    return _pieces(whole, max(1, most // columns), columns)


@dataclass(frozen=True)
class Predictions:
    """What a model predicts after each token of a slice. Each is computed when it is first requested, and kept.

    Attributes:
        logits_BTV: in the precision computed in. They are lent, and must not be changed.
    """

    logits_BTV: torch.Tensor

    @cached_property
    def log_probabilities(self) -> torch.Tensor:
        """Log-probabilities, [B, T, V], in float32."""
        return self.logits_BTV.float().log_softmax(dim=-1)

    @cached_property
    def probabilities(self) -> torch.Tensor:
        """Probabilities, [B, T, V], in float32."""
        return self.log_probabilities.exp()

    def of_pieces(self, whole: Piece, pieces: Sequence[Piece]) -> list[Predictions]:
        """The same of pieces of these windows and tokens.

        Args:
            whole: which windows and tokens these are.
            pieces: some of them.
        """
        rows, columns = (slice_of.start for slice_of in whole)
        return [
            Predictions(
                self.logits_BTV[
                    windows.start - rows : windows.stop - rows, tokens.start - columns : tokens.stop - columns
                ]
            )
            for windows, tokens in pieces
        ]

    def summed_nll(self, targets_BT: torch.Tensor, counted_BT: torch.Tensor | None = None) -> torch.Tensor:
        """The summed negative log-likelihood of the tokens that follow the first ones of the slice, [B], float64, on the CPU.

        Args:
            targets_BT: what follows; as many of the slice's tokens as there are of these predict.
            counted_BT: which of them count; all by default.
        """
        predicting = self.log_probabilities[:, : targets_BT.shape[1]]
        return -summed(predicting.gather(-1, targets_BT[..., None])[..., 0], counted_BT)


def summed(values_BT: torch.Tensor, counted_BT: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of each window's values, [B], float64, on the CPU.

    Args:
        values_BT: a number per token.
        counted_BT: which of them count; all by default.
    """
    wide_BT = exact_place(values_BT).double()
    if counted_BT is not None:
        wide_BT = wide_BT.masked_fill(~counted_BT.to(wide_BT.device), 0.0)  # not times 0: a loss may be infinite
    return wide_BT.sum(dim=1).cpu()


def mean_nll(nll_BT: torch.Tensor, counted_BT: torch.Tensor | None = None) -> torch.Tensor:
    """The mean over each window's predicted tokens, [B], float64, on the CPU.

    Args:
        nll_BT: negative log-likelihoods of tokens 1 to T-1.
        counted_BT: which of all T tokens count, the first of them never; by default all that are predicted.
    """
    if counted_BT is None:
        return exact_place(nll_BT).double().mean(dim=1).cpu()
    return summed(nll_BT, counted_BT[:, 1:]) / counted_BT[:, 1:].sum(dim=1).cpu()


def token_nll(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of tokens 1 to T-1 given those before them, [B, T-1], in nats, in float32.

    Without gradients large logits are overwritten: the caller must own them.
    """
    # The last position predicts nothing; it is dropped from the losses, because dropping it from the logits copies them.
    targets = ids_BT.roll(-1, dims=1).flatten()
    logits = logits_BTV.flatten(0, 1).float()
    if torch.is_grad_enabled() or logits.numel() <= _SMALL:
        losses = functional.cross_entropy(logits, targets, reduction="none")
    else:  # in place: log-softmax would take as much memory again
        chosen = logits.gather(1, targets[:, None])[:, 0]
        losses = _log_sum_exp_(logits).sub_(chosen)
    return losses.view(ids_BT.shape)[:, :-1].contiguous()


def head_nll(
    hidden_BTD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, ids_BT: torch.Tensor, at_once: int
) -> torch.Tensor:
    """The same from what goes into a linear head: logits are made, and reduced, for a slice of the vocabulary at a time.

    Whole logits are far larger than a cache and are gone through four times; a slice stays in it. No gradients.

    Args:
        at_once: how many logits are made at a time.
    """
    targets_R = ids_BT.roll(-1, dims=1).flatten()
    hidden_RD = hidden_BTD.flatten(0, 1)
    vocabulary, width = len(weight_VD), max(1, at_once // len(targets_R))
    chosen_R = torch.zeros(len(targets_R), device=ids_BT.device)
    sums: list[torch.Tensor] = []
    first = 0
    while first < vocabulary:
        part = slice(first, first + width)
        logits = functional.linear(hidden_RD, weight_VD[part], bias_V[part] if bias_V is not None else None).float()
        place_R = (targets_R - first).clamp(0, logits.shape[1] - 1)
        found_R = logits.gather(1, place_R[:, None])[:, 0]
        chosen_R = torch.where(place_R == targets_R - first, found_R, chosen_R)
        sums.append(_log_sum_exp_(logits))
        del logits, found_R
        first = part.stop
        # A little less each time: freed aligned memory does not hold the same again, and would add up to the whole logits.
        if width > 64 * _NARROWER:
            width -= _NARROWER
    losses_R = torch.logsumexp(torch.stack(sums), dim=0) - chosen_R
    return losses_R.view(ids_BT.shape)[:, :-1].contiguous()


def loss_scale(counted: Sequence[int], batch: int | None) -> torch.Tensor:
    """What each window's summed NLL is multiplied by, so that the gradient is the sum of those of the batches' means.

    Args:
        counted: how many predicted tokens of each window count.
        batch: windows per batch, each with its own mean loss; None for one mean over all.
    """
    size = batch or len(counted)
    batches = [counted[start : start + size] for start in range(0, len(counted), size)]
    return torch.tensor([1.0 / sum(one) for one in batches for _ in one], dtype=torch.float64)


def scaled_loss(nll_BT: torch.Tensor, scale_B: torch.Tensor, counted_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Sum over windows of scale * the window's summed loss, for autograd.

    Args:
        nll_BT: negative log-likelihoods of tokens 1 to T-1.
        scale_B: a number per window.
        counted_BT: which of all T tokens count; by default all that are predicted.
    """
    if counted_BT is not None:
        nll_BT = nll_BT.masked_fill(~counted_BT[:, 1:], 0.0)
    return (nll_BT.sum(dim=1) * scale_B.to(nll_BT)).sum()


def _log_sum_exp_(logits_RV: torch.Tensor) -> torch.Tensor:
    """log of the sum of exp over each row, [R]; the logits are overwritten."""
    largest = logits_RV.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(logits_RV.dtype).min)  # a row may be all -inf
    return logits_RV.sub_(largest).exp_().sum(dim=1).log_().add_(largest[:, 0])


def head_gradient(
    hidden_BTD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    ids_BT: torch.Tensor,
    scale_B: torch.Tensor,
    counted_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """d (sum over windows of scale * the window's summed loss) / d what goes into a linear head, [B, T, D].

    In closed form: (softmax of the logits - 1 at the target) times the weight, in the memory of the logits.
    """
    logits = functional.linear(hidden_BTD, weight_VD, bias_V)
    difference = torch.softmax(logits.float(), dim=-1)
    difference.scatter_add_(-1, ids_BT.roll(-1, dims=1)[..., None], difference.new_full((*ids_BT.shape, 1), -1.0))
    difference[:, -1] = 0  # the last position predicts nothing
    difference *= scale_B.to(difference)[:, None, None]
    if counted_BT is not None:  # a position counts where the token that it predicts does
        difference *= counted_BT.roll(-1, dims=1)[..., None]
    return (difference.to(weight_VD.dtype).flatten(0, 1) @ weight_VD).view_as(hidden_BTD)


class Head:
    """From last hidden states to losses, through a model's own final norm and head.

    Args:
        skeleton: the model without its blocks.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        # Which has this head: a cycle would keep embeddings in memory until Python looks for cycles.
        self._skeleton: Skeleton = weakref.proxy(skeleton)

    @torch.no_grad()
    def nll(self, hidden_BTD: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihoods of tokens 1 to T-1, [B, T-1] in float32. No gradients.

        Where logits are what a linear head gives they are made for a slice of the vocabulary at a time, else for as many
        windows at a time as 31 MiB hold.
        """
        head = self.linear
        rows = self._rows(ids_BT.shape[1]) if head is None else self._skeleton.rows_at_a_time(ids_BT)
        at_once = _SLICE.get(ids_BT.device.type, _SLICE["cpu"])
        found = []
        for part in slices(slice(0, len(ids_BT)), rows):
            hidden, ids = hidden_BTD[part], ids_BT[part]
            if head is None:
                found.append(token_nll(self._skeleton.logits(hidden, ids), ids))
            else:
                found.append(head_nll(self._normed(head, hidden, ids), head.weight, head.bias, ids, at_once))
        return_free_memory()  # logits of each call have sizes of their own, and what is freed of them adds up
        return torch.cat(found)

    def nll_gradient(
        self,
        hidden_BTD: torch.Tensor,
        ids_BT: torch.Tensor,
        scale_B: torch.Tensor,
        counted_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """d (sum over windows of scale * the window's summed loss) / d last hidden states, [B, T, D].

        Logits are made for as many windows at a time as 31 MiB hold.
        """
        gradient_BTD = torch.empty_like(hidden_BTD)
        head, rows = self.linear, self._rows(ids_BT.shape[1])
        for part in slices(slice(0, len(ids_BT)), rows):
            hidden = hidden_BTD[part].detach().requires_grad_(True)
            counted = None if counted_BT is None else counted_BT[part]
            if head is None:
                nll = token_nll(self._skeleton.logits(hidden, ids_BT[part]), ids_BT[part])
                torch.autograd.backward(scaled_loss(nll, scale_B[part], counted))
            else:
                normed = self._normed(head, hidden, ids_BT[part])
                with torch.no_grad():
                    outer = head_gradient(normed.detach(), head.weight, head.bias, ids_BT[part], scale_B[part], counted)
                torch.autograd.backward(normed, outer)
            gradient_BTD[part] = gradient_of(hidden)
        return gradient_BTD

    def slices(self, ids_WT: torch.Tensor) -> Iterator[Piece]:
        """(windows, tokens) whose logits 31 MiB hold: whole windows, or a part of one."""
        windows, seq_len = ids_WT.shape
        whole = slice(0, windows), slice(0, seq_len)
        return _pieces(whole, self._rows(seq_len), min(seq_len, max(1, self._tokens)))

    @cached_property
    def linear(self) -> nn.Linear | None:
        """The head, where it is a linear map and the model gives on what it gives as it is; this is tried once."""
        head = self._skeleton.output_embeddings
        if type(head) is not nn.Linear:
            return None
        made: list[torch.Tensor] = []
        handle = head.register_forward_hook(lambda _, __, output: made.append(output))
        ids_BT = torch.zeros(1, 2, dtype=torch.long, device=self._skeleton.device)
        try:
            with torch.no_grad():
                logits = self._skeleton.logits(self._skeleton.first_hidden(ids_BT), ids_BT)
        finally:
            handle.remove()
        same = len(made) == 1 and logits.shape == made[0].shape and logits.data_ptr() == made[0].data_ptr()
        return head if same else None

    def _normed(self, head: nn.Linear, hidden_BTD: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
        """What the head is given for last hidden states."""

        def stop(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            raise _NormedError(given[0])

        handle = head.register_forward_pre_hook(stop)
        try:
            self._skeleton.logits(hidden_BTD, ids_BT)
        except _NormedError as reached:
            return reached.hidden_BTD
        finally:
            handle.remove()
        raise RuntimeError("the model did not call its head")

    def _rows(self, seq_len: int) -> int:
        """How many windows' logits are held at once."""
        return max(1, self._tokens // seq_len)

    @property
    def _tokens(self) -> int:
        checkpoint = self._skeleton.checkpoint
        return _LOGITS_BYTES // (checkpoint.tensors[checkpoint.anatomy.embedding].shape[0] * 4)


class _NormedError(Exception):
    """Raised where the head would be called, with what it would be given."""

    def __init__(self, hidden_BTD: torch.Tensor) -> None:
        self.hidden_BTD = hidden_BTD


def gradient_of(tensor: torch.Tensor) -> torch.Tensor:
    """What backward left for a tensor."""
    if tensor.grad is None:
        raise RuntimeError("backward left no gradient")
    return tensor.grad
