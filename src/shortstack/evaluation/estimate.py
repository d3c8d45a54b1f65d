"""What an evaluation computes, told before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shortstack.checkpoint.forecast import Estimate, Forecast, Passes
from shortstack.data.ppl_datasets import LOCAL_COPIES, evaluation_texts
from shortstack.data.sources import Corpus
from shortstack.data.tokenizer import load_tokenizer
from shortstack.errors import ShortstackError
from shortstack.evaluation.options import TextOptions
from shortstack.evaluation.ppl import Windows

_TEXTS = TextOptions()
_SAMPLE = 200_000  # characters from which the tokens of a text are reckoned


def estimate_ppl(values: Mapping[str, Any]) -> Estimate:
    """Figures; their time follows from the tokens of the texts, where these lie here."""
    models: Sequence[Forecast | None] = values.get("models") or []
    texts = _local_texts(values)
    if texts is None:
        return Estimate("figures", untimed="how long the texts are is not known here")
    if not models or any(model is None for model in models):
        return Estimate("figures")
    options = {name: values[name] for name in ("seq_len", "bos") if name in values}
    requested = Windows.read(TextOptions(**options), values.get("limit"))
    passes = []
    for model in models:
        assert model is not None
        try:
            predicted = sum(_tokens(model, text, requested) for text in texts)
        except ShortstackError:
            return Estimate("figures", untimed="a model's tokenizer is not there yet")
        passes.append(Passes(model, predicted * len(model.kept), predicted))
    return Estimate("figures", passes=tuple(passes))


def _local_texts(values: Mapping[str, Any]) -> list[Corpus] | None:
    """The texts, where all of them are files, in the package, or local copies; else None."""
    folder = Path(values["data_dir"]) if values.get("data_dir") else None
    sources = [one.strip() for one in values.get("data", _TEXTS.data).split(",")]
    if not all(
        one == "embedded" or (folder is not None and one in LOCAL_COPIES) or Path(one).expanduser().exists()
        for one in sources
    ):
        return None
    return evaluation_texts(",".join(sources), folder)


def _tokens(model: Forecast, text: Corpus, requested: Windows) -> int:
    """Tokens of all windows, of all lengths and BOS rules; reckoned from the beginning of a long text."""
    joined = "\n\n".join(text.documents)
    tokenizer = load_tokenizer(model.checkpoint)
    tokens = len(tokenizer(joined[:_SAMPLE], add_special_tokens=False, verbose=False)["input_ids"])
    tokens = tokens * max(len(joined), 1) // max(min(len(joined), _SAMPLE), 1)
    total = 0
    for length in requested.lengths_for(model.checkpoint):
        windows = tokens // length
        total += length * min(windows, requested.limit or windows) * len(requested.rules)
    return total
