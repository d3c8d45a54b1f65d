"""How the page is served: to this machine alone unless a password guards it; it ends with the signal that services send."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shortstack.demo import app
from shortstack.demo.options import DemoOptions
from shortstack.errors import ShortstackError, UsageError

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'shortstack[demo]'")
Built = Callable[..., Path]


@pytest.mark.fault(80)
def test_public_demands_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHORTSTACK_DEMO_PASSWORD", raising=False)
    with pytest.raises(UsageError, match="holds no password") as found:
        app.demo("embedded", public=True, quiet=True)
    assert "export SHORTSTACK_DEMO_PASSWORD=" in str(found.value.hint)
    monkeypatch.setenv("SECRET", "word")
    assert app._login(DemoOptions(public=True, user="me", password_env="SECRET")) == ("me", "word")


def test_more_models_than_columns_and_ports_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="5 models given, expected at most 4"):
        app.demo(*["embedded"] * 5, quiet=True)
    with pytest.raises(UsageError, match="--port 70000"):
        app.demo("embedded", port=70000, quiet=True)


def test_a_port_that_is_taken_is_an_error_in_words() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ShortstackError, match=f"port {taken.getsockname()[1]}"):
            app.demo("embedded", port=taken.getsockname()[1], quiet=True)


def test_names_are_short_and_told_apart() -> None:
    assert app._named(["a/dense", "b/short/"]) == {"dense": "a/dense", "short": "b/short/"}
    assert app._named(["a/out", "b/out", "b/out"]) == {"a/out": "a/out", "b/out": "b/out", "b/out (2)": "b/out"}


def test_files_of_scores_and_results_are_shown_escaped_and_damaged_ones_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "results.json"
    damaged.write_text("{")
    for show in (lambda: app._results_tab([damaged]), lambda: app._scores_tab([damaged], [])):
        with pytest.raises(ShortstackError, match=re.escape(str(damaged))):
            show()
    assert "shortstack demo MODEL --scores" in app._scores_tab([], [])
    assert "shortstack demo MODEL --results" in app._results_tab([])


@pytest.fixture
def page(built: Built, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A page that another process serves, and its address."""
    command = [
        sys.executable,
        "-m",
        "shortstack",
        "demo",
        str(built("llama")),
        str(tmp_path / "nowhere"),
        "--port",
        "0",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert process.stderr is not None
        for line in process.stderr:
            found = re.search(r"http://127\.0\.0\.1:\d+/", line)
            if found:
                yield process, found[0]
                break
        else:
            pytest.fail("no page was served")
    finally:
        process.kill()
        process.wait()


@pytest.mark.fault(82)
def test_the_page_is_closed_to_what_it_does_not_need_and_ends_cleanly(
    page: tuple[subprocess.Popen[str], str], built: Built
) -> None:
    """Row 80 to 82 of the faults: no other machine, no interface for programs, no file of the disk."""
    import urllib.error
    import urllib.request

    process, address = page
    config = json.loads(urllib.request.urlopen(address + "config").read())
    assert not [d for d in config["dependencies"] if d.get("api_visibility") == "public"]
    described = json.loads(urllib.request.urlopen(address + "gradio_api/info").read())
    assert described["named_endpoints"] == {}
    for wanted in (f"gradio_api/file={built('llama')}/config.json", "gradio_api/file=/etc/hostname"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address + wanted)
        assert refused.value.code in (403, 404)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "is closed" in said[0]
    assert "Traceback" not in said[1]
