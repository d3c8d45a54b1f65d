"""Load a checkpoint's tokenizer, with errors that say what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shortstack.checkpoint.reader import Checkpoint
from shortstack.errors import ShortstackError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in the checkpoint's directory.

    Raises:
        ShortstackError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
    if not any((checkpoint.directory / name).is_file() for name in names):
        raise ShortstackError(
            f"{checkpoint.source}: no tokenizer in the directory (tokenizer.json or tokenizer.model)",
            hint="copy the tokenizer's files there, or give --data as rows of input_ids",
        )
    try:
        return AutoTokenizer.from_pretrained(checkpoint.directory, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Tokenizer files fail in many ways (the Rust library raises bare Exception), all of which a user can cause.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ShortstackError(f"{checkpoint.source}: its tokenizer cannot be loaded: {reason}") from None
