"""What a checkpoint will be that is not made yet: for checks and estimates before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from shortstack.checkpoint.reader import Checkpoint
from shortstack.errors import ShortstackError

COPIES = "reads and writes files"  # why a step's time does not follow from what it computes


@dataclass(frozen=True)
class Forecast:
    """A checkpoint, or what a step will leave of one.

    Attributes:
        checkpoint: that it is, or comes from.
        kept: positions of its blocks that stay.
        stored: bytes of a parameter, where it will be stored in another precision.
        narrower: (parameters, bytes) that every block has lost, where blocks were made narrower.
    """

    checkpoint: Checkpoint
    kept: tuple[int, ...]
    stored: int | None = None
    narrower: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Forecast:
        """A checkpoint as it is."""
        return cls(checkpoint, tuple(range(checkpoint.depth)))

    def block_parameters(self) -> list[int]:
        """Number of parameters of each block that stays."""
        sizes = self.checkpoint.block_parameters()
        return [sizes[position] - self.narrower[0] for position in self.kept]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        outside = self.checkpoint.parameters() - sum(self.checkpoint.block_parameters())
        return outside + sum(self.block_parameters())

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        if self.stored is not None:
            return self.parameters * self.stored
        sizes = sum(tensor.nbytes for block in self.checkpoint.blocks for tensor in block)
        return self.checkpoint.nbytes - sizes + sum(self.block_bytes())

    def block_bytes(self) -> list[int]:
        """Bytes of the weights of each block that stays."""
        if self.stored is not None:
            return [parameters * self.stored for parameters in self.block_parameters()]
        sizes = [sum(tensor.nbytes for tensor in block) for block in self.checkpoint.blocks]
        return [sizes[position] - self.narrower[1] for position in self.kept]

    def check_positions(self, option: str, length: int) -> None:
        """Refuse sequences that are longer than the model can take.

        Raises:
            ShortstackError: they are.
        """
        positions = self.checkpoint.positions
        if positions is not None and length > positions:
            raise ShortstackError(
                f"{option} is {length}, but {self.checkpoint.source} has {positions} positions",
                hint=f"set {option} to {positions} or less",
            )


@dataclass(frozen=True)
class Passes:
    """Tokens that go through a model.

    Attributes:
        model: which.
        blocks: how many tokens go through a block, all blocks together; a gradient is three times as much.
        head: how many go through the output head.
    """

    model: Forecast
    blocks: float
    head: float


@dataclass(frozen=True)
class Estimate:
    """What a step leaves behind, and what it computes.

    Attributes:
        makes: in words.
        nbytes: how much of the disk that takes.
        temporary_nbytes: how much more of it the step needs while it runs.
        forecast: the checkpoint that it makes, or that its plan leaves, as far as that is known.
        criteria: of the scores that it makes.
        passes: what it computes, as far as that is known beforehand.
        untimed: why that says nothing of its time.
        fastest: `--dtype auto` computes it in the precision that measures fastest.
    """

    makes: str
    nbytes: int = 0
    temporary_nbytes: int = 0
    forecast: Forecast | None = None
    criteria: tuple[str, ...] = ()
    passes: tuple[Passes, ...] = ()
    untimed: str = ""
    fastest: bool = False
