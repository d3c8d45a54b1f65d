"""What a row of the table of families cannot say in data: small named functions that rows point at.

All are pure functions of the raw config (and of names and shapes on disk), tested against transformers' AutoConfig, so
that pruning a known family imports neither torch nor transformers. A module per kind:

- lists: write out a per-block list that a config only implies by a rule;
- rewrites: re-derive the entries that hold block numbers or counts, for the blocks that stay;
- refusals: why a set of blocks cannot go exactly;
- tensors: what few families need of their tensors beyond dropping and renumbering.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

Config = Mapping[str, Any]
# (config, depth) -> the per-block lists that the config implies
Expansion = Callable[[Config, int], dict[str, list[Any]]]
# (config as it was, depth before, kept positions) -> entries to set
Rewrite = Callable[[Config, int, Sequence[int]], dict[str, Any]]
# (config with every list written out, depth, removed positions, tensor names) -> why this is not exact, or None
Refusal = Callable[[Config, int, Sequence[int], Collection[str]], "str | None"]

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
