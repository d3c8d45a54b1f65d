"""The record of a scoring run: per criterion a number per block, the order of removal, and how it was made."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shortstack.artifacts.protected import protected_blocks
from shortstack.artifacts.ranking_text import ranking_text
from shortstack.artifacts.source_table import sources_table
from shortstack.common import json_fields as records
from shortstack.common.formatting import counted, ranges, seconds, size
from shortstack.common.json_fields import nested
from shortstack.common.json_text import read_json
from shortstack.common.keywords import said_in_python
from shortstack.common.shown import Shown
from shortstack.errors import ShortstackError, did_you_mean, system_reason
from shortstack.runtime.atomic_output import write_json

SCHEMA = 1
_PUBLISHED = ("ppl", "taylor", "magnitude")  # whose orders are published in folders such as `ppl_n10`


class Identified(Protocol):
    """What scores are checked against: an opened checkpoint."""

    @property
    def source(self) -> str:
        """What the user called it."""

    @property
    def fingerprint(self) -> str:
        """The hash that tells it from others."""

    @property
    def original_blocks(self) -> tuple[int, ...]:
        """Original index of each of its blocks."""


@dataclass(frozen=True)
class CriterionScores:
    """The scores of one criterion.

    Attributes:
        name: The criterion with its parameters, as it was requested.
        scores: One number for each scored block, in the order of the checkpoint's blocks. Blocks with lower scores are
            removed first. It is empty if only an order is known.
        blocks: The number of each scored block in the original model.
        stderr: The standard error of each score over the windows; None for criteria without one. For `ppl` it is that
            of the paired difference to the dense model in nats per token.
        dense_ppl: The perplexity of the dense model, if the scores are perplexities without each block (`base` in
            scores.json); None for all other criteria.
        tensors: For criteria that score tensors, the score of each tensor of each block (by its number in the original
            model).
        known_order: The order of removal, if a file holds nothing else.
        run: The number of adjacent blocks that a score belongs to. The first of them is the block of the score.
        sources: The scores on the windows of each named source; empty if the text has one source.
    """

    name: str
    scores: tuple[float, ...]
    blocks: tuple[int, ...]
    stderr: tuple[float, ...] | None = None
    dense_ppl: float | None = None
    tensors: dict[int, dict[str, float]] = field(default_factory=dict)
    known_order: tuple[int, ...] | None = None
    run: int = 1
    sources: Mapping[str, CriterionScores] = field(default_factory=dict)

    @property
    def order(self) -> tuple[int, ...]:
        """The scored blocks by their numbers in the original model: lowest score first, equal scores by number."""
        if self.known_order is not None:
            return self.known_order
        return tuple(index for _, index in sorted(zip(self.scores, self.blocks, strict=True)))

    @property
    def is_bare(self) -> bool:
        """Whether only the order is known, as in a block_order.csv."""
        return not self.scores

    def errors_by_block(self) -> dict[int, float]:
        """The standard error of each block, by its number in the original model; empty if there are none."""
        return dict(zip(self.blocks, self.stderr or (), strict=False))

    def by_block(self) -> dict[int, float] | None:
        """The score of each block, by its number in the original model; None if only an order is known."""
        return dict(zip(self.blocks, self.scores, strict=True)) if self.scores else None


@dataclass(frozen=True, repr=False)
class Scores(Shown):
    """The scores of every criterion of a scoring run; `to_json` is scores.json, schema 1.

    Attributes:
        source: The checkpoint, as it was named in the call.
        fingerprint: The fingerprint of the checkpoint; None if only an order of blocks is known.
        blocks: The blocks of the checkpoint, by their numbers in the original model.
        criteria: The scores of each criterion by its name, in the requested order.
        calibration: The source, sha256, sampling, seed and size of the calibration set.
        settings: The dtype, the device, the memory mode and versions.
        seconds: The wall-clock time of the whole command, including loading, in seconds.
        peak_rss_bytes: The peak memory of the process in bytes.
    """

    source: str
    fingerprint: str | None
    blocks: tuple[int, ...]
    criteria: dict[str, CriterionScores]
    calibration: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak_rss_bytes: int = 0

    @said_in_python
    def criterion(self, name: str | None = None) -> CriterionScores:
        """The scores of one criterion. Its name can be left out if there is only one.

        Raises:
            ShortstackError: there is no such criterion, there are several and no name was given, or the file is an
                order by another criterion.
        """
        listed = ", ".join(self.criteria)
        if name is None:
            if len(self.criteria) == 1:
                return next(iter(self.criteria.values()))
            raise ShortstackError(f"{self.source}: the scores hold {listed}", hint="choose one with --criterion")
        if name in self.criteria:
            return self.criteria[name]
        only = next(iter(self.criteria.values()))
        if only.is_bare:
            self._check_folder(name)
            return dataclasses.replace(only, name=name)
        raise ShortstackError(
            f"{self.source}: the scores hold {listed}, not {name}", hint=did_you_mean(name, self.criteria)
        )

    def _check_folder(self, name: str) -> None:
        """The published layout says in the folder's name what an order is by; other folders may be called `exp_n5`."""
        folder = Path(self.source).absolute().parent
        match = re.fullmatch(r"(.+)_n\d+", folder.name)
        tables = ("block_score_sorted.csv", f"all_{match[1]}_sorted.csv") if match else ()
        if match is None or not (
            re.split(r"[^a-z]", match[1])[0] in _PUBLISHED or any((folder / name).is_file() for name in tables)
        ):
            return
        given, stated = criterion_folder(name), match[1]
        if not (given.startswith(stated) or stated.startswith(given)):
            raise ShortstackError(
                f"{self.source}: its folder states that it is an order by {stated}; --criterion {name} contradicts it",
                hint="leave --criterion out, or give the order that you mean",
            )

    def check_belongs_to(self, checkpoint: Identified) -> None:
        """Refuse scores of another model.

        Raises:
            ShortstackError: the fingerprints differ, or the order does not name exactly the blocks of the checkpoint.
        """
        if sorted(self.blocks) != list(checkpoint.original_blocks):
            raise ShortstackError(
                f"{self.source}: scores for blocks {ranges(self.blocks)}, but {checkpoint.source} has blocks "
                f"{ranges(checkpoint.original_blocks)}",
                hint="score this model",
            )
        if self.fingerprint is not None and self.fingerprint != checkpoint.fingerprint:
            raise ShortstackError(
                f"{checkpoint.source}: the scores were made from another checkpoint ({self.source}; the fingerprints differ)",
                hint="score this one, or give a block_order.csv, which is not tied to a checkpoint",
            )

    def provenance(self, name: str) -> dict[str, Any]:
        """What a plan or a pruned checkpoint records about the origin of its scores."""
        return {"source": self.source, "criterion": name, "calibration": self.calibration, "settings": self.settings}

    def to_json(self) -> dict[str, Any]:
        """The content of scores.json (schema 1)."""
        from shortstack.artifacts.provenance import versions

        criteria = {name: _entry(found, self.blocks) for name, found in self.criteria.items()}
        return {
            "schema": SCHEMA,
            "model": {
                "source": self.source,
                "fingerprint": self.fingerprint,
                "blocks": len(self.blocks),
                "original_blocks": list(self.blocks),
            },
            "calibration": self.calibration,
            "criteria": criteria,
            "settings": self.settings,
            "shortstack": versions().get("shortstack", ""),
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
        }

    def save(self, path: str | Path) -> None:
        """Write scores.json."""
        write_json(Path(path), self.to_json())

    def table_rows(self) -> list[dict[str, Any]]:
        """One row for each criterion and block; the block that is removed first is first."""
        found = []
        for name, one in self.criteria.items():
            scores, errors = one.by_block() or {}, one.errors_by_block()
            for rank, block in enumerate(one.order, start=1):
                row = {"criterion": name, "rank": rank, "block": block, "score": scores.get(block)}
                row |= {"stderr": errors.get(block)}
                found.append(row | {source: (of.by_block() or {}).get(block) for source, of in one.sources.items()})
        return found

    def to_text(self) -> str:
        """The ranking with bars, for a terminal. The block at the top is removed first."""
        protected, _ = protected_blocks(self.blocks, None)
        parts = [
            text
            for found in self.criteria.values()
            for text in (ranking_text(found, protected), sources_table(found).to_text() if found.sources else "")
            if text
        ]
        not_scored = sorted(set(self.blocks).difference(*(found.blocks for found in self.criteria.values())))
        if not_scored:
            parts.append(f"not scored: {ranges(not_scored)}")
        if self.calibration:
            windows = counted(self.calibration.get("samples") or 0, "window")
            windows += " each" if self.calibration.get("sources") else ""
            windows += f" of {self.calibration.get('seq_len')} tokens from {self.calibration.get('source')}"
            windows = windows if self.calibration.get("samples") else "from the weights alone"
            used = f"; {seconds(self.seconds)}, peak memory {size(self.peak_rss_bytes)}" if self.seconds else ""
            parts.append(f"{self.source}: {windows}{used}")
        else:
            parts.append(f"{self.source}: how it was made is unknown")
        if says := nested(self.settings, "until", "says"):
            parts.append(str(says))
        return "\n\n".join(parts)


@said_in_python
def load_scores(path: str | Path) -> Scores:
    """Read a scores.json, or a block_order.csv (one line of block numbers in the order of removal).

    Args:
        path: The file.

    Returns:
        The scores. Those of a block_order.csv have only an order.

    Raises:
        ShortstackError: there is no such file, or it is neither of these.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ShortstackError(
            f"{path}: no such file", hint="shortstack score MODEL --out scores.json writes one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ShortstackError(
            f"{path}: cannot be read ({system_reason(error)})", hint="give a scores.json or a block_order.csv"
        ) from None
    if path.suffix.lower() == ".csv":
        return _from_block_order(path, text)
    try:
        return _from_json(path, read_json(text))
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ShortstackError(
            f"{path}: neither scores of shortstack nor a block order ({error})",
            hint="expected scores.json, or block_order.csv with one line of block numbers",
        ) from None


def _from_json(path: Path, record: Any) -> Scores:
    model = records.mapping(record, "model")
    if record.get("schema") != SCHEMA:
        raise ShortstackError(
            f"{path}: scores schema {record.get('schema')!r}, this shortstack reads {SCHEMA}",
            hint="score the model again, or upgrade shortstack",
        )
    if "original_blocks" in model:
        blocks = records.block_numbers(model, "original_blocks")
    else:
        blocks = tuple(range(min(1 << 20, int(records.number(model.get("blocks"), "blocks")))))
    entries = records.mapping(record, "criteria")
    criteria = {name: _criterion(path, name, entry, blocks) for name, entry in entries.items()}
    if not criteria:
        raise TypeError("criteria is empty")
    return Scores(
        source=records.text(model, "source"),
        fingerprint=None if model.get("fingerprint", "") is None else records.text(model, "fingerprint"),
        blocks=blocks,
        criteria=criteria,
        calibration=records.mapping(record, "calibration"),
        settings=records.mapping(record, "settings") if "settings" in record else {},
        seconds=records.number(record.get("seconds", 0.0), "seconds"),
        peak_rss_bytes=int(records.number(record.get("peak_rss_bytes", 0), "peak_rss_bytes")),
    )


def _criterion(path: Path, name: str, entry: Any, blocks: Sequence[int]) -> CriterionScores:
    """What one criterion says, of all windows or of those of a named source."""
    listed = entry.get("scores") if isinstance(entry, dict) else None
    if isinstance(listed, list) and (len(listed) != len(blocks) or len(set(blocks)) != len(blocks)):
        raise ShortstackError(
            f"{path}: {name} has {len(listed)} scores for {len(blocks)} blocks", hint="score the model again"
        )
    values = _numbers(entry, "scores")
    scored = tuple(block for block, score in zip(blocks, listed or (), strict=True) if score is not None)
    if not values:
        order = records.block_numbers(entry, "order")
        return CriterionScores(name, (), tuple(sorted(order)), known_order=order)
    stderr = _numbers(entry, "stderr") if entry.get("stderr") is not None else None
    dense_ppl = records.number(entry["base"], "base") if entry.get("base") is not None else None
    if stderr is not None and len(stderr) != len(values):
        raise TypeError(f"{name} has {len(stderr)} standard errors for {len(values)} scores")
    if dense_ppl is not None and min(dense_ppl, *values) <= 0:
        raise TypeError(f"{name} holds a perplexity that is not above 0")
    tensors = {int(index): dict(found) for index, found in (entry.get("tensors") or {}).items()}
    run = int(records.number(entry.get("run", 1), "run"))
    of_sources = records.mapping(entry, "sources") if "sources" in entry else {}
    sources = {source: _criterion(path, f"{name} of {source}", one, blocks) for source, one in of_sources.items()}
    sources = {source: dataclasses.replace(one, name=name) for source, one in sources.items()}
    for source, one in sources.items():
        if one.blocks != scored or one.is_bare or (one.dense_ppl is None) != (dense_ppl is None):
            raise TypeError(f"{name} of {source} is of other blocks, or of another kind, than {name}")
    return CriterionScores(name, values, scored, stderr, dense_ppl, tensors, run=run, sources=sources)


def _entry(found: CriterionScores, blocks: Sequence[int]) -> dict[str, Any]:
    """A criterion's part of scores.json."""
    place = {block: number for number, block in enumerate(found.blocks)}
    # A block that was not scored has null for its score.
    places = [None if found.is_bare else place.get(block) for block in blocks]
    entry: dict[str, Any] = {
        "scores": [None if at is None else found.scores[at] for at in places],
        "order": list(found.order),
        "stderr": None if found.stderr is None else [None if at is None else found.stderr[at] for at in places],
        "lower_is_removed_first": True,
    }
    if found.dense_ppl is not None:
        entry["base"] = found.dense_ppl
    if found.run > 1:
        entry["run"] = found.run
    if found.tensors:
        entry["tensors"] = {str(index): tensors for index, tensors in found.tensors.items()}
    if found.sources:
        entry["sources"] = {source: _entry(one, blocks) for source, one in found.sources.items()}
    return entry


def _numbers(entry: Any, key: str) -> tuple[float, ...]:
    """Numbers, those that are null left out; one may be infinite: a model without the block predicts nothing."""
    found = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(found, list):
        raise TypeError(f"{key} is {found!r:.60}, expected a list of numbers")
    values = tuple(records.number(value, key) for value in found if value is not None)
    if any(math.isnan(value) for value in values):
        raise TypeError(f"{key} holds NaN, which is not a number")
    return values


def _from_block_order(path: Path, text: str) -> Scores:
    rows = [(number, row) for number, row in enumerate(text.splitlines(), start=1) if row.strip()]
    if len(rows) != 1:
        raise ShortstackError(
            f"{path}: expected one line of block numbers, found {len(rows)}",
            hint="such as 3,1,2,0: first removed first",
        )
    number, row = rows[0]
    order: list[int] = []
    for column, cell in enumerate(row.split(","), start=1):
        place = f"{path}: row {number}, cell {column}"
        match = re.fullmatch(r"\s*(\d{1,6})\s*", cell)
        if not match:
            raise ShortstackError(
                f"{place}: {cell.strip()!r} is not a block number", hint="numbers are those of the original model"
            )
        block = int(match.group(1))
        if block in order:
            raise ShortstackError(f"{place}: duplicate block {block}", hint="name each block once")
        order.append(block)
    blocks = tuple(sorted(order))
    only = CriterionScores(path.name, (), blocks, known_order=tuple(order))
    return Scores(source=str(path), fingerprint=None, blocks=blocks, criteria={path.name: only})


def criterion_folder(criterion: str) -> str:
    """A criterion as the published layout names its folder, before the number of windows."""
    return re.sub(r"[^A-Za-z0-9]+", "-", criterion)
