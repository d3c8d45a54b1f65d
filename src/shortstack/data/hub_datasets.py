"""Data sets on the hub: the published ones by name, any other by id; files are fetched one by one, as they are read."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, overload

from shortstack.checkpoint.downloads import shown_download
from shortstack.checkpoint.hub import asked, file_sizes, looks_like_a_path, parse_hub_id
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError, did_you_mean

if TYPE_CHECKING:
    from shortstack.data.files import Role

_PARQUET = "refs/convert/parquet"  # the hub's own conversion of sets that were published as a script


@dataclass(frozen=True)
class HubSet:
    """One published set: where its files are on the hub.

    Attributes:
        repository: its id.
        training: pattern of the files that are trained on.
        calibration: pattern of those that calibration windows are drawn from; empty for the same.
        evaluation: pattern of the files that the published figures are computed on.
        revision: a branch other than the main one.
    """

    repository: str
    training: str
    evaluation: str
    revision: str | None = None
    calibration: str = ""

    def pattern(self, role: Role) -> str:
        """Of the files that go with a role."""
        if role == "evaluation":
            return self.evaluation
        return self.calibration if role == "calibration" and self.calibration else self.training


NAMED_SETS = {
    "wikitext2": HubSet("Salesforce/wikitext", "wikitext-2-raw-v1/train-*.parquet", "wikitext-2-raw-v1/test-*.parquet"),
    "ptb": HubSet(
        "ptb-text-only/ptb_text_only",
        "penn_treebank/train/*.parquet",
        "penn_treebank/validation/*.parquet",
        _PARQUET,
    ),
    # Published calibration sets (GPTQ's and those after it) are drawn from the first of its 1024 training files.
    "c4": HubSet(
        "allenai/c4",
        "en/c4-train.*.json.gz",
        "en/c4-validation.*.json.gz",
        calibration="en/c4-train.00000-of-01024.json.gz",
    ),
    "bookcorpus": HubSet("bookcorpus/bookcorpus", "plain_text/train/*.parquet", "plain_text/train/*.parquet", _PARQUET),
    "alpaca-cleaned": HubSet("yahma/alpaca-cleaned", "*.json", "*.json"),
}


def hub_files(source: str, *, role: Role, progress: Progress | None = None) -> Sequence[Path]:
    """The files of a set on the hub; each is downloaded when it is first requested, and found in the cache after that.

    Args:
        source: a published name (`NAMED_SETS`) or a hub id with an optional `@revision`.
        role: what they are for: the part of the set that goes with it.
        progress: reports which files of a set that is not a published one are read, and which are skipped.

    Raises:
        ShortstackError: no such set, what the hub answered, or nothing in it that can be read.
    """
    from shortstack.data.files import SUFFIXES, files_for

    known = NAMED_SETS.get(source)
    if known is not None:
        repository, revision = known.repository, known.revision
    else:
        repository, revision = hub_set_id(source)
    sizes = _files_of(source, repository, revision)
    names = list(sizes)
    chosen = fnmatch.filter(names, known.pattern(role)) if known else files_for(source, names, role, progress)
    if not chosen:
        raise ShortstackError(
            f"{source}: the data set on the hub has no file that shortstack can read",
            hint=f"expected {' '.join(SUFFIXES)}",
        )
    known_sizes = {name: nbytes for name in chosen if (nbytes := sizes[name]) is not None}
    return HubFiles(source, repository, revision, sorted(chosen), known_sizes)


@dataclass(frozen=True)
class HubFiles(Sequence[Path]):
    """Files on the hub as local paths, each downloaded when it is requested."""

    source: str
    repository: str
    revision: str | None
    names: list[str]
    sizes: Mapping[str, int] = field(default_factory=dict)
    _known: dict[int, Path] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Path]: ...

    def __getitem__(self, index: int | slice) -> Path | Sequence[Path]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if index not in self._known:
            from huggingface_hub import hf_hub_download

            name = self.names[index]
            with shown_download(f"{self.source} {name.rpartition('/')[2]}", self._missing(name)) as shown:
                fetch = functools.partial(
                    hf_hub_download, self.repository, name, repo_type="dataset", revision=self.revision, **shown
                )
                self._known[index] = Path(asked(self.source, fetch, what="data set"))
        return self._known[index]

    def _missing(self, name: str) -> int | None:
        """Bytes of a file that are still to come; None where the hub did not say."""
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.repository, name, repo_type="dataset", revision=self.revision)
        return 0 if isinstance(cached, str) else self.sizes.get(name)


def hub_set_id(source: str) -> tuple[str, str | None]:
    """(id, revision or None) of a set on the hub that is not one of the published names.

    Raises:
        ShortstackError: it is no hub id, so it was meant as a path, and nothing is there.
    """
    from shortstack.data.files import SUFFIXES, suffix_of

    found = parse_hub_id(source)
    if found is None or "/" not in found[0] or looks_like_a_path(source) or suffix_of(Path(source)) in SUFFIXES:
        names = ("embedded", *NAMED_SETS)
        otherwise = f"give a file, a folder, a hub id, or one of {', '.join(names)}"
        hint = did_you_mean(source, names, otherwise=otherwise)
        raise ShortstackError(f"{source}: no such file or folder", hint=hint)
    return found


def _files_of(source: str, repository: str, revision: str | None) -> Mapping[str, int | None]:
    """Every file of a set, with its bytes where the hub was asked."""
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        with contextlib.suppress(Exception):
            cached = snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True)
            return {str(path.relative_to(cached)): None for path in Path(cached).rglob("*") if path.is_file()}
    listing = functools.partial(file_sizes, repository, revision, repo_type="dataset")
    return dict(asked(source, listing, what="data set"))
