"""The model without its blocks: what each block is called with, and from the last hidden state to losses.

Every block is replaced. To learn the arguments, by a recorder that returns its hidden states unchanged and keeps what
else it was called with; to finish, the first one by an injector that returns a given hidden state. The model's own
forward does the rest, so no family needs code of its own.

Legend: B windows in a batch, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from shortstack.checkpoint.byte_copy import TensorCopy, same_bytes
from shortstack.checkpoint.reader import Checkpoint
from shortstack.engine.cpu import USUAL_COUNT, worker_count
from shortstack.engine.interface import slices
from shortstack.engine.load import experts_for
from shortstack.engine.losses import Head
from shortstack.engine.stand_ins import BlockCall, Injector, Recorded, Recorder, find_blocks
from shortstack.engine.weight_conversion import Conversion
from shortstack.errors import ShortstackError, first_line
from shortstack.runtime.libraries import import_transformers
from shortstack.runtime.private_names import initialize_again

# How many tokens go through a block at a time: on a CPU activations stay near the cache while matrix products are large
# enough; a GPU wants more.
TOKENS_AT_A_TIME = {"cpu": 1280, "cuda": 16384}
_BUILDING = threading.Lock()


class NotSeparableError(ShortstackError):
    """The blocks of a model cannot be run one at a time: it must be held whole, and blocks bypassed."""

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
        head: makes losses of last hidden states.
        dtype, device: what everything is computed in and on.

    Args:
        like: another one, whose tensors outside the blocks are used where they are the same to the byte.
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
        like: Skeleton | None = None,
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
        self.conversion = Conversion(self._model, checkpoint)
        _compute_tables(self._model, self.conversion, checkpoint.source)
        load_outside_blocks(
            self._model,
            self.conversion,
            checkpoint,
            dtype=dtype,
            device=device,
            blocks_name=self.blocks_name,
            lent={} if like is None else _lent(checkpoint, like),
        )
        self.head = Head(self)
        self._returns_tuple = False
        self._calls: dict[tuple[int, int], list[BlockCall]] = {}

    def first_hidden(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """The hidden states that go into the first block, [B, T, D]."""
        return self.record(ids_BT)[0][0]

    def calls(self, ids_BT: torch.Tensor) -> list[BlockCall]:
        """What each block is called with for windows of this shape.

        Windows are never padded, so the arguments depend on the shape alone; that they do is checked once per shape.
        """
        key = (ids_BT.shape[0], ids_BT.shape[1])
        if key not in self._calls:
            calls = [call for _, call in self.record(ids_BT)]
            other = [call for _, call in self.record(ids_BT.roll(1, dims=1))]
            if not all(_equal(first, second) for first, second in zip(calls, other, strict=True)):
                raise NotSeparableError(self.checkpoint.source, "its blocks receive inputs that depend on the text")
            self._calls[key] = calls
        return self._calls[key]

    def rows_at_a_time(self, ids_BT: torch.Tensor) -> int:
        """How many windows go through a block, or the head, at a time: at least one."""
        return max(1, self.tokens // ids_BT.shape[1])

    def batches(self, ids_WT: torch.Tensor, some: slice | None = None) -> list[slice]:
        """Windows, or some of them, as many at a time as go through a block."""
        return slices(some or slice(0, len(ids_WT)), self.rows_at_a_time(ids_WT))

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
        self._say(f"out of memory on {self.device}: continuing with {self.tokens} tokens at a time")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def run_block(self, block: nn.Module, hidden_BTD: torch.Tensor, call: BlockCall) -> torch.Tensor:
        """One block on one batch."""
        result: Any = block(hidden_BTD, *call.args, **call.kwargs)
        hidden: torch.Tensor = result[0] if isinstance(result, (tuple, list)) else result
        return hidden

    def logits(self, hidden_BTD: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
        """Final norm and head on last hidden states, [B, T, V], as the model itself computes them."""
        stand_ins = [Injector(block, self._returns_tuple) for block in self.blocks]
        stand_ins[0].hidden_BTD = hidden_BTD
        with self._replaced(stand_ins):
            logits: torch.Tensor = self._model(input_ids=ids_BT, use_cache=False).logits
        return logits

    @property
    def output_embeddings(self) -> nn.Module | None:
        """The model's head, where it has one of its own."""
        found: nn.Module | None = self._model.get_output_embeddings()  # type: ignore[operator]
        return found

    def record(self, ids_BT: torch.Tensor, **more: torch.Tensor) -> list[tuple[torch.Tensor, BlockCall]]:
        """For each block what goes in, were all before it to change nothing, and what else it is called with.

        Args:
            ids_BT: the windows.
            **more: what else the model's own forward is given, such as `attention_mask`; what it does not take is left out.
        """
        taken = inspect.signature(self._model.forward).parameters
        more = {name: value for name, value in more.items() if name in taken}
        log, failure = self._recorded(ids_BT, more)
        odd = len(log) != len(self.blocks) or any(hidden.shape != log[0][0].shape for hidden, _ in log)
        if odd and log and not self._returns_tuple:
            # The one known case: the model takes what a block gave apart (its first row, or a failure to unpack it),
            # because its blocks return tuples.
            self._returns_tuple = True
            log, failure = self._recorded(ids_BT, more)
        if failure is not None:
            raise ShortstackError(
                f"{self.checkpoint.source}: the model's own forward fails: {type(failure).__name__}: {first_line(failure)}",
                hint="`shortstack check` shows whether transformers runs it; --debug shows where it fails",
            ) from failure
        if len(log) != len(self.blocks):
            raise NotSeparableError(self.checkpoint.source, f"{len(log)} of its {len(self.blocks)} blocks were called")
        return log

    @torch.no_grad()
    def _recorded(
        self, ids_BT: torch.Tensor, more: dict[str, torch.Tensor]
    ) -> tuple[list[tuple[torch.Tensor, BlockCall]], Exception | None]:
        """(the calls of blocks up to the last one, how the model failed before it)."""
        log: list[tuple[torch.Tensor, BlockCall]] = []
        last = len(self.blocks) - 1
        recorders = [
            Recorder(block, self._returns_tuple, log, index == last) for index, block in enumerate(self.blocks)
        ]
        try:
            with self._replaced(recorders):
                self._model(input_ids=ids_BT, use_cache=False, **more)
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


def _lent(checkpoint: Checkpoint, like: Skeleton) -> dict[str, torch.Tensor]:
    """What another skeleton holds of the tensors outside the blocks, by name in the model, where the bytes are the same."""
    theirs, found = like.checkpoint.tensors, {}
    held = dict([*like._model.named_parameters(remove_duplicate=False), *like._model.named_buffers()])
    for part in like.conversion.parts(like.checkpoint.outside_blocks):
        same = [
            (mine := checkpoint.tensors.get(name)) is not None
            and (mine.dtype, mine.shape) == (theirs[name].dtype, theirs[name].shape)
            and same_bytes(TensorCopy(mine, name), TensorCopy(theirs[name], name))
            for name, _ in part.sources
        ]
        if part.rule is None and all(same) and part.target in held:
            found[part.target] = held[part.target]
    return found


def _empty_model(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    import_transformers()
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=trust_remote_code)
        # Skeleton and blocks are built at once, so that they agree about attention: a block at eager attention, called
        # with the mask of sdpa (none), would not be causal and would say nothing. One at a time: transformers sets torch's
        # default precision meanwhile, for all threads.
        with _BUILDING, torch.random.fork_rng(devices=[]), torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code, **experts_for(dtype)
            )
    except (ValueError, ImportError, KeyError) as error:
        raise ShortstackError(
            f"{checkpoint.source}: transformers cannot build this model: {first_line(error)}"
        ) from None
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:  # drawn at random, which the device does not catch
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, nn.Parameter(parameter.to("meta"), parameter.requires_grad))
    return model


def _compute_tables(model: nn.Module, conversion: Conversion, source: str) -> None:
    """Make the tables that no checkpoint holds (rotary frequencies), with the model's own code, as transformers does.

    Raises:
        NotSeparableError: a table is not made so.
    """
    places = [
        (module, name, buffer)
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_meta and not conversion.makes(f"{prefix}.{name}".removeprefix("."))
    ]

    def made(fill: int) -> list[torch.Tensor]:
        for module, name, buffer in places:
            setattr(module, name, torch.full_like(buffer, fill, device="cpu"))
        initialize_again(model, [module for module, _, _ in places])
        return [getattr(module, name) for module, name, _ in places]

    with torch.random.fork_rng(devices=[]):
        is_made = all(map(torch.equal, made(0), made(1)))
    if not is_made:  # something is still there of what was there before
        raise NotSeparableError(source, "it holds tables that cannot be built without the model")


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
