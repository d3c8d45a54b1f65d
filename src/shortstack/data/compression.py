"""Files of rows, plain or compressed (.gz, .zst), read as a stream from any byte of their text."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from shortstack.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_PIECE = 1 << 18  # compressed bytes at a time


def open_rows(file: Path, start: int = 0) -> IO[bytes]:
    """A file's text from byte `start`, decompressed where its name ends in .gz or .zst."""
    suffix = file.suffix.lower()
    if suffix != ".zst":
        stream: IO[bytes] = (gzip.open if suffix == ".gz" else open)(file, "rb")  # type: ignore[assignment]
        stream.seek(start)
        return stream
    frames = io.BufferedReader(_Pieces(_zstd_pieces(file)))
    while start > 0:  # a stream of frames cannot be entered in the middle
        start -= len(frames.read(min(start, 1 << 20))) or start
    return frames


def _zstd_pieces(file: Path) -> Iterator[bytes]:
    """Decompressed bytes, frame after frame; zstandard's own reader says nothing of a last frame that is cut off.

    Raises:
        UsageError: zstandard is not installed.
        OSError: not such a file, or a broken one.
    """
    try:
        import zstandard
    except ImportError:
        raise UsageError(f"{file}: reading .zst needs zstandard", hint="pip install 'shortstack[retrain]'") from None
    frame, inside = zstandard.ZstdDecompressor().decompressobj(), False
    with file.open("rb") as compressed:
        while data := compressed.read(_PIECE):
            while data:
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise OSError(0, f"not a zstd file, or a broken one: {error}") from None
                inside, data = not frame.eof, frame.unused_data
                if not inside:
                    frame = zstandard.ZstdDecompressor().decompressobj()
    if inside:
        raise OSError(0, "it ends in the middle of a frame")


class _Pieces(io.RawIOBase):
    """Pieces of bytes as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._left = pieces, memoryview(b"")

    def readable(self) -> bool:
        """As a file says it."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill a buffer with what comes next; 0 at the end."""
        target = memoryview(buffer).cast("B")
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        size = min(len(target), len(self._left))
        target[:size] = self._left[:size]
        self._left = self._left[size:]
        return size
