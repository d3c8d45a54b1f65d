"""Which files of a SOURCE are read (the one it names, those of a folder or hub set that go with their role), and how.

Plain and compressed files (.gz, .zst) are read as a stream from any byte of their text.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from shortstack.common.progress import Progress
from shortstack.data.decompressed import COMPRESSED, Decompressed, Entries
from shortstack.errors import ShortstackError, UsageError, system_reason

TEXT_SUFFIXES = (".txt", ".raw", ".tokens", ".text")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz", ".jsonl.zst")

Role = Literal["calibration", "evaluation", "training"]

# The words that name a split, as the datasets library has them.
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_RECORDS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # of the datasets library
_NAMES_SHOWN = 4


def source_files(source: str, *, role: Role, progress: Progress | None = None) -> Sequence[Path]:
    """The files of a SOURCE that is not `embedded`: one, those of a folder in name order, or a hub set's.

    A hub set's files are downloaded when they are indexed, one by one.

    Args:
        source: a path, or a set on the hub.
        role: what they are for; of a folder with splits, those that go with it (`files_for`).
        progress: reports which files of a folder are read and which are skipped.

    Raises:
        ShortstackError: nothing there, or nothing that goes with the role.
    """
    if not source.strip():  # as a path, it would be the working folder
        raise UsageError(
            f"{source!r} is not the name of a text", hint="give a file, a folder, a data set on the hub, or embedded"
        )
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder_files(source, path, role, progress)
    if path.exists():
        return [path]
    from shortstack.data.hub_datasets import hub_files

    return hub_files(source, role=role, progress=progress)


def suffix_of(file: Path) -> str:
    """The end of a file's name that determines what it holds, such as `.jsonl` or `.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] in ([".gz"], [".zst"]) else "".join(suffixes[-1:])


def split_of(name: str) -> str | None:
    """`train`, `validation` or `test`, where a file's name or the nearest folder's has such a word; else None."""
    for part in reversed(PurePosixPath(name.lower()).parts):
        words = set(re.split(r"[^a-z]+", part))
        for split, known in _SPLITS.items():
            if words & known:
                return split
    return None


def files_for(source: str, names: Sequence[str], role: Role, progress: Progress | None = None) -> list[str]:
    """Of the files in a folder or set, those that are read for a role.

    Evaluation reads the test split, else the validation split, else everything. Calibration and training read the
    training split and files of no split: a test or validation split is never used for them.

    Args:
        source: what the user called the folder or set.
        names: of all its files, relative to it.
        role: what they are for.
        progress: reports what is read and what is skipped.

    Raises:
        ShortstackError: no file can be read, or all of them are of other splits.
    """
    skipped: dict[str, str] = {name: reason for name in names if (reason := _no_data(name))}
    splits = {name: split_of(name) for name in sorted(names) if name not in skipped}
    if role == "evaluation":
        wanted = next((split for split in ("test", "validation") if split in splits.values()), None)
        chosen = [name for name, split in splits.items() if wanted in (None, split)]
    else:
        chosen = [name for name, split in splits.items() if split in ("train", None)]
        if splits and not chosen:
            raise ShortstackError(
                f"{source}: holds only a test or validation split ({_listed(list(splits))}), which {role} does not use",
                hint="give the file itself instead of its folder",
            )
    skipped |= {name: f"{split or 'no'} split" for name, split in splits.items() if name not in chosen}
    if chosen and skipped and progress is not None:
        progress.say(f"{source}: reads {_listed(chosen)}; skipped: {_reasons(skipped)}")
    return chosen


def _folder_files(source: str, folder: Path, role: Role, progress: Progress | None) -> list[Path]:
    chosen = files_for(source, [file.name for file in folder.iterdir() if file.is_file()], role, progress)
    if chosen:
        return [folder / name for name in chosen]
    if any(folder.glob("*.arrow")) or any(folder.glob("*/*.arrow")):
        raise ShortstackError(
            f"{source}: was written by save_to_disk of the datasets library (.arrow files)",
            hint=f"write it as rows: datasets.load_from_disk({source!r}) and .to_json('train.jsonl')",
        )
    below = sorted(
        {
            str(file.parent)
            for file in folder.glob("*/**/*")
            if file.is_file() and not _no_data(str(file.relative_to(folder)))
        }
    )
    if below:
        raise ShortstackError(f"{source}: no text in this folder, but in {_listed(below)}", hint="give one of those")
    raise ShortstackError(f"{source}: no text in this folder", hint=f"expected files ending in {' '.join(SUFFIXES)}")


def _no_data(name: str) -> str:
    """Why a file is not read whatever it is for; empty where it may be."""
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts):
        return "hidden"
    if path.name in _RECORDS:
        return "a record of the datasets library"
    return "" if suffix_of(Path(path)) in SUFFIXES else "no rows or text"


def _reasons(skipped: dict[str, str]) -> str:
    by_reason = {reason: [name for name, why in skipped.items() if why == reason] for reason in skipped.values()}
    return "; ".join(f"{_listed(sorted(names))} ({reason})" for reason, names in by_reason.items())


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


@contextlib.contextmanager
def readable(place: object) -> Iterator[None]:
    """Within, whatever the system refuses is an error that names the place."""
    try:
        yield
    except OSError as error:
        raise ShortstackError(
            f"{place}: cannot be read ({system_reason(error)})", hint="check the path and its permissions"
        ) from None


def open_rows(file: Path, start: int = 0, *, entries: Entries | None = None) -> IO[bytes]:
    """A file's text from byte `start`, decompressed where its name ends in .gz or .zst; it can be sought in.

    Args:
        file: which.
        start: where the stream stands.
        entries: collects places at which a compressed file can be entered, and uses those that are in it.

    Raises:
        ShortstackError: by this or by reading, a compressed file that is broken, cut off, or something else.
        OSError: it is not there, or may not be read.
    """
    if file.suffix.lower() in COMPRESSED:
        stream: IO[bytes] = io.BufferedReader(Decompressed(file, entries), 1 << 17)
    else:
        stream = file.open("rb")
    stream.seek(start)
    return stream
