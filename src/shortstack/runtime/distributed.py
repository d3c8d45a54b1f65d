"""The processes that were started together by torchrun or accelerate: who this one is, and what they add up.

Legend: W windows.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shortstack.errors import ShortstackError, UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Process:
    """This process among those that work together, as torchrun and accelerate tell it."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Process:
        """Of this process; alone where no launcher started it."""
        number = {name: int(os.environ.get(name, default)) for name, default in
                  (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))}  # fmt: skip
        return cls(number["RANK"], number["WORLD_SIZE"], number["LOCAL_RANK"])

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def own_device(self, device: torch.device) -> torch.device:
        """The device of this process: on a machine with several GPUs, its own."""
        import torch

        if self.world == 1 or device.type != "cuda":
            return device
        return torch.device("cuda", self.local_rank)

    def part(self, items: int) -> slice:
        """This process's share of so many items: parts lie side by side, in the order of the processes.

        Raises:
            UsageError: there are fewer items than processes.
        """
        if items < self.world:
            raise UsageError(
                f"{items} windows for {self.world} processes", hint="use more --samples, or fewer processes"
            )
        return slice(self.rank * items // self.world, (self.rank + 1) * items // self.world)

    def gathered(self, part: torch.Tensor, items: int) -> torch.Tensor:
        """All processes' parts of a tensor on the CPU, side by side along its last dimension.

        Args:
            part: this process's.
            items: how many all have together.
        """
        if self.world == 1:
            return part
        from torch import distributed

        whole = part.new_zeros((*part.shape[:-1], items))  # each place is one process's: a sum puts them together
        whole[..., self.part(items)] = part
        with _companions_alive():
            distributed.all_reduce(whole)
        return whole

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' tensors, in float32 at least."""
        if self.world == 1:
            return tensor
        import torch
        from torch import distributed

        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous().clone()
        with _companions_alive():
            distributed.all_reduce(wide)
        return wide


ALONE = Process()


@contextlib.contextmanager
def _companions_alive() -> Iterator[None]:
    """What a library says where another process has ended, in a line."""
    try:
        yield
    except RuntimeError as error:
        raise ShortstackError(
            f"another process of this run has ended, or cannot be reached ({str(error).splitlines()[0][:120]})",
            hint="its messages are above; the same command resumes from the saved state",
        ) from None


@contextlib.contextmanager
def together(process: Process) -> Iterator[None]:
    """Within, the processes can add up tensors; a group that is there already is used and stays."""
    if process.world == 1:
        yield
        return
    from torch import distributed

    owns = not distributed.is_initialized()
    join(process)
    try:
        yield
        if owns:
            distributed.barrier()
    finally:
        if owns:
            leave()


def join(process: Process) -> None:
    """Make the group of processes, where there is none yet. Launchers' stores know it by one name: once in a process."""
    import torch
    from torch import distributed

    if process.world > 1 and not distributed.is_initialized():
        on_cuda = torch.cuda.is_available()
        if on_cuda:
            torch.cuda.set_device(process.local_rank)
        distributed.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")


def leave() -> None:
    """Let the group go, where there is one."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
