"""Compressed files (.gz, .zst) as the text in them, entered at any byte of it; what is broken or cut off is named."""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.errors import ShortstackError, UsageError, first_line

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

COMPRESSED = (".gz", ".zst")
_PIECE = 1 << 16  # compressed bytes at a time
_GZIP = 31  # of zlib: a gzip header, the largest window
# How a file begins -> what it is, and what to do with it where .gz or .zst was expected, or text.
_BEGINS = (
    (b"\x1f\x8b", "gzip", "rename it to end in .gz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "rename it to end in .zst"),
    (b"\xfd7zXZ\0", "xz", "unpack it: xz -d"),
    (b"BZh", "bzip2", "unpack it: bzip2 -d"),
    (b"PK\x03\x04", "zip", "unpack it: unzip"),
    (b"version https://git-lfs", "a Git-LFS pointer", "run: git lfs pull"),
    (b"<", "HTML or XML", "download the file again"),
    (b"{", "plain JSON", "take the ending off its name"),
    (b"[", "plain JSON", "take the ending off its name"),
)
_PACKED = {"gzip", "zstd", "xz", "bzip2", "zip"}


def kind_by_content(data: bytes, *, packed: bool = False) -> tuple[str, str] | None:
    """(what a file is that begins so, what to do), where its name says something else; None where that is not known.

    Args:
        data: how it begins.
        packed: only what is compressed.
    """
    for begin, kind, hint in _BEGINS:
        if data.startswith(begin) and (kind in _PACKED or not packed):
            return kind, hint
    return None


@dataclass
class Entries:
    """Places at which a compressed file can be entered without all that lies before; filled while it is read.

    Attributes:
        spacing: at least this many compressed bytes lie between two.
        places: (byte of the text, byte of the file, state of the decompressor there; None between two frames), ascending.
    """

    spacing: int
    places: list[tuple[int, int, Any]] = field(default_factory=list)

    def before(self, at: int) -> tuple[int, int, Any]:
        """The last place that is not behind byte `at` of the text."""
        return next((place for place in reversed(self.places) if place[0] <= at), (0, 0, None))


class Decompressed(io.RawIOBase):
    """The text of a .gz or .zst file, all of its members or frames.

    Args:
        file: which; its name's ending says how it is compressed.
        entries: where it can be entered; places are added as they are come by.

    Raises:
        ShortstackError: by reading, the file is broken, cut off, or something else.
        UsageError: zstandard is not installed.
        OSError: it is not there, or may not be read.
    """

    def __init__(self, file: Path, entries: Entries | None = None) -> None:
        self._file, self._entries = file, entries or Entries(1 << 62)
        self._is_gzip = file.suffix.lower() == ".gz"
        self._errors: tuple[type[Exception], ...] = (zlib.error,)
        if not self._is_gzip:
            try:
                import zstandard
            except ImportError:
                raise UsageError(
                    f"{file}: reading .zst needs zstandard", hint="pip install 'shortstack[retrain]'"
                ) from None
            self._errors = (zstandard.ZstdError,)
        self._packed = file.open("rb")
        self._enter(0, 0, None)

    def readable(self) -> bool:
        """As a file says it."""
        return True

    def seekable(self) -> bool:
        """As a file says it."""
        return True

    def tell(self) -> int:
        """The byte of the text that comes next."""
        return self._at

    def close(self) -> None:
        """Close the file."""
        self._packed.close()
        super().close()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte of the text, from the last place before it at which the file can be entered."""
        target = offset + (self._at if whence == io.SEEK_CUR else 0)
        place = self._entries.before(target)
        if target < self._at or place[0] > self._at:
            self._enter(*place)
        while self._at < target and (skipped := self._take(target - self._at)):
            self._at += len(skipped)
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill a buffer with what comes next; 0 at the end."""
        target = memoryview(buffer).cast("B")
        taken = self._take(len(target))
        target[: len(taken)] = taken
        self._at += len(taken)
        return len(taken)

    def _enter(self, at: int, begin: int, state: Any) -> None:
        self._at, self._left, self._pending = at, memoryview(b""), b""
        self._packed.seek(begin)
        self._frame, self._is_inside = state.copy() if state else self._new_frame(), state is not None

    def _take(self, most: int) -> memoryview:
        """Up to so many bytes of what comes next; none at the end."""
        while not self._left and (piece := self._piece()) is not None:
            self._left = memoryview(piece)
        taken, self._left = self._left[:most], self._left[most:]
        return taken

    def _piece(self) -> bytes | None:
        """What the next compressed bytes hold (perhaps nothing); None at the end."""
        data = self._pending or self._packed.read(_PIECE)
        begin = self._packed.tell() - len(data)
        if not data:
            if self._is_inside:
                raise ShortstackError(
                    f"{self._file}: ends in the middle of its compressed data (after {begin} bytes)",
                    hint="download it again",
                )
            return None
        if begin == 0 and (known := kind_by_content(data)) and known[0] != ("gzip" if self._is_gzip else "zstd"):
            raise ShortstackError(f"{self._file}: is {known[0]}, not {self._file.suffix}", hint=known[1])
        self._mark(begin)
        if self._is_gzip and not self._is_inside and begin:
            data = data.lstrip(b"\0")  # what some programs fill the last block of a tape with
            if not data:
                self._pending = b""
                return b""
        try:
            text: bytes = self._frame.decompress(data)
        except self._errors as error:
            raise ShortstackError(
                f"{self._file}: not {'gzip' if self._is_gzip else 'zstd'}, or broken, near byte {begin} "
                f"({first_line(error)})",
                hint="download it again",
            ) from None
        self._is_inside, self._pending = not self._frame.eof, self._frame.unused_data
        if not self._is_inside:
            self._frame = self._new_frame()
        return text

    def _mark(self, begin: int) -> None:
        places = self._entries.places
        can_copy = not self._is_inside or self._is_gzip
        if can_copy and begin - (places[-1][1] if places else 0) >= self._entries.spacing:
            places.append((self._at, begin, self._frame.copy() if self._is_inside else None))

    def _new_frame(self) -> Any:
        if self._is_gzip:
            return zlib.decompressobj(_GZIP)
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj()
