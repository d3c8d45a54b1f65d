"""Load a checkpoint's tokenizer, with errors that say what to do."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shortstack.checkpoint.config_file import Repair, repaired
from shortstack.checkpoint.reader import Checkpoint
from shortstack.checkpoint.tokenizer_files import NEEDED_FILES
from shortstack.common.phases import phase
from shortstack.errors import ShortstackError, first_line
from shortstack.runtime.libraries import import_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in the checkpoint's directory, or the one chosen in its place; of one with a known fault, without it.

    Raises:
        ShortstackError: there is none, it cannot be read, or the one chosen has more ids than the model.
    """
    chosen = checkpoint.tokenizer
    if chosen is None:
        with _repaired_directory(checkpoint.directory, checkpoint.repair) as directory:
            return tokenizer_in(directory, checkpoint.source, trust_remote_code=trust_remote_code)
    with _repaired_directory(chosen.directory, chosen.repair) as directory:
        tokenizer = tokenizer_in(directory, f"--tokenizer {chosen.source}", trust_remote_code=trust_remote_code)
    # Tokens that were added to a tokenizer often have no row; a text that holds one is refused where it is read.
    added = tokenizer.get_added_vocab()
    largest = max((number for token, number in tokenizer.get_vocab().items() if token not in added), default=-1)
    if largest >= checkpoint.embedding_rows:
        raise ShortstackError(
            f"--tokenizer {chosen.source}: has ids up to {largest}, but the embedding of {checkpoint.source} has "
            f"{checkpoint.embedding_rows} rows",
            hint="give the tokenizer that the model was trained with",
        )
    return tokenizer


@phase("loading the tokenizer")
def tokenizer_in(directory: Path, source: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory, which errors call `source`.

    Raises:
        ShortstackError: there is none, or it cannot be read.
    """
    import_transformers()
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in NEEDED_FILES):
        raise ShortstackError(
            f"{source}: no tokenizer in the directory (tokenizer.json or tokenizer.model)",
            hint="--tokenizer DIR names another one; or give --data as rows of input_ids",
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code
        )
        _ = tokenizer.bos_token_id, tokenizer.eos_token_id  # a special token that is no token recurses for ever here
        return tokenizer
    except Exception as error:
        # Tokenizer files fail in many ways (the Rust library raises bare Exception), all of which a user can cause.
        raise ShortstackError(
            f"{source}: its tokenizer cannot be loaded: {first_line(error)}",
            hint="download the files of the tokenizer again",
        ) from None


def open_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that something follows: without the end of text that some tokenizers put behind everything."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The id that ends a text, or nothing where the tokenizer has none."""
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def padding_id(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> int:
    """What stands where nothing is: padding is masked, so that any token that the embedding has a row for will do."""
    pad = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    return pad if rows is None or pad < rows else 0


def check_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], rows: int | None, place: str) -> None:
    """Refuse a text with a token that was added to the tokenizer, where the embedding was not made larger for it.

    Args:
        tokenizer: names the token.
        ids: of the text.
        rows: of the embedding; None checks nothing.
        place: file and row, for the error.

    Raises:
        ShortstackError: an id is not below `rows`.
    """
    largest = max(ids, default=-1)
    if rows is not None and largest >= rows:
        raise ShortstackError(
            f"{place}: {tokenizer.convert_ids_to_tokens(largest)} is token {largest}, but the embedding has {rows} rows",
            hint="the token was added only to the tokenizer: remove it there or from the row, or resize the embedding",
        )


@contextlib.contextmanager
def _repaired_directory(directory: Path, repair: Repair | None) -> Iterator[Path]:
    """A directory; for one with a known fault, a copy of its small files without it."""
    if repair is None:
        yield directory
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in directory.iterdir():
            if path.is_file() and path.suffix in (".json", ".model", ".txt", ".jinja"):
                (Path(folder) / path.name).write_bytes(repaired(repair, path.name, path.read_bytes()))
        yield Path(folder)
