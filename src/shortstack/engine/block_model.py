"""The model without its blocks: what each block is called with, and from the last hidden state to losses.

Every block is replaced. To learn the arguments, by a recorder that returns its hidden states unchanged and keeps what
else it was called with; to finish, the first one by an injector that returns a given hidden state. The model's own
forward does the rest, so no family needs code of its own.

Legend: B windows in a batch, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import nn

from shortstack.checkpoint.reader import Checkpoint
from shortstack.engine.cpu import USUAL_COUNT, worker_count
from shortstack.engine.load import experts_for
from shortstack.engine.losses import head_gradient, head_nll, token_nll
from shortstack.engine.stand_ins import BlockCall, Injector, Normed, Recorded, Recorder, find_blocks
from shortstack.engine.weight_conversion import Conversion
from shortstack.errors import ShortstackError, first_line
from shortstack.runtime.libraries import import_transformers

# How many tokens go through a block at a time: on a CPU activations stay near the cache while matrix products are large
# enough; a GPU wants more.
TOKENS_AT_A_TIME = {"cpu": 1280, "cuda": 16384}
_BUILDING = threading.Lock()
# Logits held at once, float32. Below 32 MiB the allocator keeps the pages; where they are made in slices of the
# vocabulary, a slice is to stay in the cache.
_LOGITS_BYTES = 31 << 20
_SLICE = {"cpu": 5 << 19, "cuda": 1 << 27}


class NotSeparableError(ShortstackError):
    """The blocks of a model cannot be run one at a time: it must be held whole, and blocks passed over."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(
            f"{source}: its blocks cannot be run one at a time: {reason}",
            hint="--memory resident holds the whole model",
        )
        self.reason = reason


class Skeleton:
    """Embeddings, final norm and head of a checkpoint, with its blocks as empty modules.

    Attributes:
        tokens: how many tokens go through a block at a time.
        blocks: the block modules, their parameters on the meta device, in order.
        blocks_name: what the model calls their list.
        conversion: how stored tensors become parameters.
        dtype, device: what everything is computed in and on.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device,
        tokens: int | None = None,
        trust_remote_code: bool = False,
        say: Callable[[str], object] = lambda _: None,
    ):
        from shortstack.engine.block_weights import load_outside_blocks

        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self._say = say
        self.tokens = tokens or TOKENS_AT_A_TIME.get(device.type, 4096)
        self._model = _empty_model(checkpoint, dtype, trust_remote_code)
        self._model.eval()
        self.blocks_name, self._layers = find_blocks(self._model, checkpoint.anatomy)
        self.blocks: list[nn.Module] = list(self._layers)
        for block in self.blocks:
            if any(buffer.is_meta for buffer in block.buffers()):
                raise NotSeparableError(
                    checkpoint.source, "its blocks hold tables that cannot be built without the model"
                )
        self.conversion = Conversion(self._model, checkpoint)
        load_outside_blocks(
            self._model, self.conversion, checkpoint, dtype=dtype, device=device, blocks_name=self.blocks_name
        )
        self._returns_tuple = False
        self._calls: dict[tuple[int, int], list[BlockCall]] = {}

    def first_hidden(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """The hidden states that go into the first block, [B, T, D]."""
        return self._record(ids_BT)[0][0]

    def calls(self, ids_BT: torch.Tensor) -> list[BlockCall]:
        """What each block is called with for windows of this shape.

        Windows are never padded, so the arguments depend on the shape alone; that they do is checked once per shape.
        """
        key = (ids_BT.shape[0], ids_BT.shape[1])
        if key not in self._calls:
            calls = [call for _, call in self._record(ids_BT)]
            other = [call for _, call in self._record(ids_BT.roll(1, dims=1))]
            if not all(_equal(first, second) for first, second in zip(calls, other, strict=True)):
                raise NotSeparableError(self.checkpoint.source, "its blocks are given what depends on the text")
            self._calls[key] = calls
        return self._calls[key]

    def rows_at_a_time(self, ids_BT: torch.Tensor) -> int:
        """How many windows go through a block, or the head, at a time: at least one."""
        return max(1, self.tokens // ids_BT.shape[1])

    def rows_side_by_side(self, ids_BT: torch.Tensor, total: int) -> int:
        """How many of `total` windows one of several threads runs at a time: their activations share the cache."""
        if self.device.type != "cpu":
            return self.rows_at_a_time(ids_BT)
        count = worker_count(self.device)
        rows = max(1, self.tokens // max(USUAL_COUNT, count) // ids_BT.shape[1])
        even = -(-total // count)  # a few windows are dealt out at once, so that no thread waits for another
        return even if count > 1 and even <= min(2 * rows, self.rows_at_a_time(ids_BT)) else rows

    def with_fewer_tokens(self, seq_len: int) -> bool:
        """Half as many tokens at a time, where memory ran out; False where there is one window only."""
        if self.tokens // 2 < seq_len:
            return False
        self.tokens //= 2
        self._calls.clear()
        self._say(f"out of memory on {self.device}: going on with {self.tokens} tokens at a time")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def run_block(self, block: nn.Module, hidden_BTD: torch.Tensor, call: BlockCall) -> torch.Tensor:
        """One block on one batch."""
        result: Any = block(hidden_BTD, *call.args, **call.kwargs)
        hidden: torch.Tensor = result[0] if isinstance(result, (tuple, list)) else result
        return hidden

    @torch.no_grad()
    def nll(self, hidden_BTD: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
        """From last hidden states to negative log-likelihoods of tokens 1 to T-1, [B, T-1] in float32. No gradients.

        Where logits are what a linear head gives they are made for a slice of the vocabulary at a time, else for as many
        windows at a time as 31 MiB hold.
        """
        head = self._linear_head
        rows = self.logit_rows(ids_BT.shape[1]) if head is None else self.rows_at_a_time(ids_BT)
        at_once = _SLICE.get(self.device.type, _SLICE["cpu"])
        found = []
        for start in range(0, len(ids_BT), rows):
            hidden, ids = hidden_BTD[start : start + rows], ids_BT[start : start + rows]
            if head is None:
                found.append(token_nll(self.logits(hidden, ids), ids))
            else:
                found.append(head_nll(self._normed(head, hidden, ids), head.weight, head.bias, ids, at_once))
        return torch.cat(found)

    def nll_gradient(self, hidden_BTD: torch.Tensor, ids_BT: torch.Tensor, scale_B: torch.Tensor) -> torch.Tensor:
        """d (sum over windows of scale * the window's summed loss) / d last hidden states, [B, T, D].

        Logits are made for as many windows at a time as 31 MiB hold.
        """
        gradient_BTD = torch.empty_like(hidden_BTD)
        head, rows = self._linear_head, self.logit_rows(ids_BT.shape[1])
        for start in range(0, len(ids_BT), rows):
            part = slice(start, start + rows)
            hidden = hidden_BTD[part].detach().requires_grad_(True)
            if head is None:
                nll = token_nll(self.logits(hidden, ids_BT[part]), ids_BT[part])
                torch.autograd.backward((nll.sum(dim=1) * scale_B[part].to(nll)).sum())
            else:
                normed = self._normed(head, hidden, ids_BT[part])
                with torch.no_grad():
                    outer = head_gradient(normed.detach(), head.weight, head.bias, ids_BT[part], scale_B[part])
                torch.autograd.backward(normed, outer)
            gradient_BTD[part] = gradient_of(hidden)
        return gradient_BTD

    def logit_rows(self, seq_len: int) -> int:
        """How many windows' logits are held at once."""
        return max(1, self._logit_tokens // seq_len)

    def logit_slices(self, ids_WT: torch.Tensor) -> Iterator[tuple[slice, slice]]:
        """(windows, tokens) whose logits 31 MiB hold: whole windows, or a part of one."""
        windows, seq_len = ids_WT.shape
        rows, tokens = self.logit_rows(seq_len), min(seq_len, max(1, self._logit_tokens))
        for row in range(0, windows, rows):
            for start in range(0, seq_len, tokens):
                yield slice(row, min(row + rows, windows)), slice(start, min(start + tokens, seq_len))

    @property
    def _logit_tokens(self) -> int:
        vocabulary = self.checkpoint.tensors[self.checkpoint.anatomy.embedding].shape[0]
        return _LOGITS_BYTES // (vocabulary * 4)

    def logits(self, hidden_BTD: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
        """Final norm and head on last hidden states, [B, T, V], as the model itself computes them."""
        stand_ins = [Injector(block, self._returns_tuple) for block in self.blocks]
        stand_ins[0].hidden_BTD = hidden_BTD
        with self._replaced(stand_ins):
            logits: torch.Tensor = self._model(input_ids=ids_BT, use_cache=False).logits
        return logits

    @cached_property
    def _linear_head(self) -> nn.Linear | None:
        """The head, where it is a linear map and the model gives on what it gives as it is; this is tried once."""
        head = self._model.get_output_embeddings()  # type: ignore[operator]
        if type(head) is not nn.Linear:
            return None
        made: list[torch.Tensor] = []
        handle = head.register_forward_hook(lambda _, __, output: made.append(output))
        ids_BT = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        try:
            with torch.no_grad():
                logits = self.logits(self.first_hidden(ids_BT), ids_BT)
        finally:
            handle.remove()
        same = len(made) == 1 and logits.shape == made[0].shape and logits.data_ptr() == made[0].data_ptr()
        return head if same else None

    def _normed(self, head: nn.Linear, hidden_BTD: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
        """What the head is given for last hidden states."""

        def stop(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            raise Normed(given[0])

        handle = head.register_forward_pre_hook(stop)
        try:
            self.logits(hidden_BTD, ids_BT)
        except Normed as reached:
            return reached.hidden_BTD
        finally:
            handle.remove()
        raise RuntimeError("the model did not call its head")

    def _record(self, ids_BT: torch.Tensor) -> list[tuple[torch.Tensor, BlockCall]]:
        log, failure = self._recorded(ids_BT)
        odd = len(log) != len(self.blocks) or any(hidden.shape != log[0][0].shape for hidden, _ in log)
        if odd and log and not self._returns_tuple:
            # The one known case: the model takes what a block gave apart (its first row, or a failure to unpack it),
            # because its blocks return tuples.
            self._returns_tuple = True
            log, failure = self._recorded(ids_BT)
        if failure is not None:
            raise ShortstackError(
                f"{self.checkpoint.source}: the model's own forward fails: {type(failure).__name__}: {first_line(failure)}",
                hint="`shortstack check` shows whether transformers runs it; --debug shows where it fails",
            ) from failure
        if len(log) != len(self.blocks):
            raise NotSeparableError(self.checkpoint.source, f"{len(log)} of its {len(self.blocks)} blocks were called")
        return log

    @torch.no_grad()
    def _recorded(self, ids_BT: torch.Tensor) -> tuple[list[tuple[torch.Tensor, BlockCall]], Exception | None]:
        """(the calls of blocks up to the last one, how the model failed before it)."""
        log: list[tuple[torch.Tensor, BlockCall]] = []
        last = len(self.blocks) - 1
        recorders = [
            Recorder(block, self._returns_tuple, log, index == last) for index, block in enumerate(self.blocks)
        ]
        try:
            with self._replaced(recorders):
                self._model(input_ids=ids_BT, use_cache=False)
        except Recorded:
            pass
        except (IndexError, ValueError, TypeError) as failure:  # so does taking a tensor apart, as if it were a tuple
            return log, failure
        return log, None

    @contextlib.contextmanager
    def _replaced(self, stand_ins: list[Any]) -> Iterator[None]:
        for index, stand_in in enumerate(stand_ins):
            self._layers[index] = stand_in
        try:
            yield
        finally:
            for index, block in enumerate(self.blocks):
                self._layers[index] = block


def _empty_model(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    import_transformers()
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=trust_remote_code)
        # Skeleton and blocks are built at once, so that they agree about attention: a block at eager attention, called
        # with the mask of sdpa (none), would not be causal and would say nothing.
        with _parameters_on_meta():
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code, **experts_for(dtype)
            )
    except (ValueError, ImportError, KeyError) as error:
        raise ShortstackError(
            f"{checkpoint.source}: transformers cannot build this model: {first_line(error)}"
        ) from None
    return model


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Build modules whose parameters take no memory while their tables (rotary frequencies) are real.

    Building on the meta device would lose the tables, which no checkpoint holds.
    """
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    with _BUILDING:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]


def gradient_of(tensor: torch.Tensor) -> torch.Tensor:
    """What backward left for a tensor."""
    if tensor.grad is None:
        raise RuntimeError("backward left no gradient")
    return tensor.grad


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, BlockCall):
        return _equal(first.args, second.args) and _equal(first.kwargs, second.kwargs)
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.shape == second.shape and bool(torch.equal(first, second))
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(_equal(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    return bool(first == second)
