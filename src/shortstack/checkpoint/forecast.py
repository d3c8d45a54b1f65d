"""What a checkpoint will be that is not made yet: for checks and estimates before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from shortstack.checkpoint.reader import Checkpoint
from shortstack.errors import ShortstackError


@dataclass(frozen=True)
class Forecast:
    """A checkpoint, or what a step will leave of one.

    Attributes:
        checkpoint: that it is, or comes from.
        kept: positions of its blocks that stay.
        stored: bytes of a parameter, where it will be stored in another precision.
    """

    checkpoint: Checkpoint
    kept: tuple[int, ...]
    stored: int | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Forecast:
        """A checkpoint as it is."""
        return cls(checkpoint, tuple(range(checkpoint.depth)))

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        sizes = self.checkpoint.block_parameters()
        return self.checkpoint.parameters() - sum(sizes) + sum(sizes[position] for position in self.kept)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        if self.stored is not None:
            return self.parameters * self.stored
        sizes = [sum(tensor.nbytes for tensor in block) for block in self.checkpoint.blocks]
        return self.checkpoint.nbytes - sum(sizes) + sum(sizes[position] for position in self.kept)

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
class Estimate:
    """What a step leaves behind.

    Attributes:
        makes: in words.
        nbytes: how much of the disk that takes.
        temporary_nbytes: how much more of it the step needs while it runs.
        forecast: the checkpoint that it makes, or that its plan leaves, as far as that is known.
        criteria: of the scores that it makes.
    """

    makes: str
    nbytes: int = 0
    temporary_nbytes: int = 0
    forecast: Forecast | None = None
    criteria: tuple[str, ...] = ()
