"""Phases: timed for who looks, the inner ones apart from the outer, and nothing otherwise."""

from __future__ import annotations

import threading

import pytest

from shortstack.common import phases
from shortstack.common.phases import is_watched, phase, watched
from shortstack.common.progress import Progress


def test_what_is_within_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, 4.0, 10.0, 20.0, 22.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(moments))
    with watched() as seen:
        with phase("outer"), phase("inner"):
            pass
        with phase("inner"):
            pass
    assert seen.seconds == {"outer": 7.0, "inner": 5.0}


def test_a_bar_is_a_phase_and_so_is_a_decorated_function() -> None:
    @phase("decorated")
    def function() -> int:
        return 1

    with watched() as seen, Progress(quiet=True).bar("copy", 10) as advance:
        advance(10)
        assert function() == 1
    assert set(seen.seconds) == {"copy", "decorated"}


def test_nothing_is_timed_unless_somebody_looks() -> None:
    assert not is_watched()
    with phase("alone"):
        assert not is_watched()
    with watched() as seen:
        assert is_watched()
        thread = threading.Thread(target=phase("of a thread")(lambda: None))
        thread.start()
        thread.join()
    assert seen.seconds == {}
