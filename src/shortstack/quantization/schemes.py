"""The schemes: how many bits, what is scaled together, what it needs of data and of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from shortstack.errors import ShortstackError, UsageError

if TYPE_CHECKING:
    import torch

SchemeName = Literal["W4A16", "W8A16", "W8A8", "FP8_DYNAMIC", "NVFP4A16"]
GROUP_SIZES = (128, 64, 32)  # the largest that divides a layer's inputs is taken


@dataclass(frozen=True)
class Scheme:
    """One way to store the weights of linear layers.

    Attributes:
        name: as llm-compressor calls it.
        bits: of a stored weight.
        group_sizes: how many weights of a row share a scale, the preferred number first; empty where a whole row does.
        scale_bits: of a scale.
        gptq: weights are rounded one after another, each making up for the ones before (GPTQ), which needs text; else
            each to the nearest value.
        dtype: a type that the device must have.
    """

    name: SchemeName
    bits: int
    group_sizes: tuple[int, ...] = ()
    scale_bits: int = 16
    gptq: bool = True
    dtype: str = ""

    def with_group_size(self, group_size: int | None) -> tuple[int, ...]:
        """The group sizes that may be taken where a user names one, or none.

        Raises:
            UsageError: the scheme has none to choose, or it is no size.
        """
        if group_size is None:
            return self.group_sizes
        if self.group_sizes != GROUP_SIZES:
            raise UsageError(
                f"--group-size {group_size}: {self.name} does not use groups of that size",
                hint="leave it out; only W4A16 and W8A16 use it",
            )
        if group_size < 1:
            raise UsageError(f"--group-size {group_size}: expected a number of weights, such as 128, 64 or 32")
        return (group_size,)

    def refuse_device(self, device: torch.device) -> None:
        """Say now that the machine lacks what the scheme needs.

        Raises:
            ShortstackError: it does.
        """
        import torch

        if not self.dtype:
            return
        try:
            torch.ones(1, device=device).to(getattr(torch, self.dtype)).float()
        except (AttributeError, RuntimeError, TypeError):
            raise ShortstackError(
                f"--scheme {self.name}: {device} has no {self.dtype} with torch {torch.__version__}",
                hint="use W4A16, which needs only integers; or another device, or a newer torch",
            ) from None


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("W4A16", 4, GROUP_SIZES),
        Scheme("W8A16", 8, GROUP_SIZES),
        Scheme("W8A8", 8),
        Scheme("FP8_DYNAMIC", 8, gptq=False, dtype="float8_e4m3fn"),
        Scheme("NVFP4A16", 4, (16,), scale_bits=8, gptq=False, dtype="float8_e4m3fn"),
    )
}


def scheme_named(name: str) -> Scheme:
    """The scheme of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in SCHEMES:
        raise UsageError(f"--scheme {name}: unknown", hint=f"known: {', '.join(SCHEMES)}")
    return SCHEMES[name]
