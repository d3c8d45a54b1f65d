"""Streams of candidates in groups, as many as memory allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shortstack.common.formatting import parse_size
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError
from shortstack.scoring.score import score
from tests import pico
from tests.scoring.material import scored

Built = Callable[..., Path]


@pytest.mark.parametrize("streams", [2, 3, 5])
@pytest.mark.fault(91)
def test_groups_of_streams_give_the_same(built: Built, streams: int) -> None:
    model = built("llama")
    windows = pico.windows()
    one_stream = len(windows) * len(windows[0]) * 32 * 4
    together = scored(model, windows, "ppl,taylor")
    in_groups = scored(model, windows, "ppl,taylor", stream_bytes=streams * one_stream)
    for name in ("ppl", "taylor"):
        assert in_groups.criteria[name].scores == pytest.approx(together.criteria[name].scores, rel=1e-6)


@pytest.mark.parametrize(
    ("criteria", "streams", "group"),
    [("ppl", 3, 1), ("ppl", 4, 2), ("ppl,taylor", 7 + 5, 3), ("ppl", 7, 6), ("ppl", 99, 6)],
)
def test_a_limit_of_memory_makes_groups(
    built: Built,
    criteria: str,
    streams: int,
    group: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The streams share the limit with what a backward sweep needs kept: an input per block, and the last output."""
    from shortstack.engine.streamed import StreamedModel

    model, windows = built("llama"), pico.windows()
    seen = []
    real = StreamedModel.forward

    def forward(self: StreamedModel, *arguments: Any, **options: Any) -> Any:
        seen.append(self.group)
        return real(self, *arguments, **options)

    monkeypatch.setattr(StreamedModel, "forward", forward)
    one_stream = len(windows) * len(windows[0]) * 32 * 4
    together = scored(model, windows, criteria)
    limited = scored(model, windows, criteria, memory_bytes=streams * one_stream, progress=Progress())
    assert seen == [6, group]
    assert limited.settings.get("group", 6) == group
    line = f"{group} are computed at a time, and the weights are read {-(-6 // group)} times\n"
    assert capsys.readouterr().err.count(line) == (group < 6)
    for name in criteria.split(","):
        assert limited.criteria[name].scores == pytest.approx(together.criteria[name].scores, rel=1e-6)
    with pytest.raises(ShortstackError, match=r"--memory-limit .*: hidden states of all windows take"):
        scored(model, windows, criteria, memory_bytes=2 * one_stream)


@pytest.mark.parametrize(("text", "size"), [("4GB", 4 * 10**9), ("1.5 kb", 1500), ("500M", 5 * 10**8), ("2000", 2000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_what_is_no_size(built: Built, tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match="'lots' is not a size"):
        score(str(built("llama")), memory_limit="lots")
