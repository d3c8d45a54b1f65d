"""The page in a real browser: its style is taken under its own policy, and nothing is wider than a telephone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from shortstack.publishing.report import inputs
from shortstack.publishing.report.report import report
from tests.publishing.report.material import PRUNED, RETRAINED, folder_of_all

# The page lies in a frame as wide as a screen; what is in it is measured from outside, since it runs no script itself.
_FRAME = """<!DOCTYPE html><meta charset="utf-8"><body>
<iframe width="{width}" height="900" srcdoc="{page}"></iframe><pre id="found"></pre>
<script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const wide = [...page.querySelectorAll("body *")].filter(one => !one.closest(".scroll") && !one.closest("svg") &&
    one.getBoundingClientRect().right > root.clientWidth + 1);
  const texts = [...page.querySelectorAll("svg text")].filter(one => {{
    const box = one.getBoundingClientRect(), around = one.ownerSVGElement.getBoundingClientRect();
    return box.left < around.left - 1 || box.right > around.right + 1;
  }});
  document.querySelector("#found").textContent = JSON.stringify([
    root.scrollWidth, root.clientWidth, page.defaultView.getComputedStyle(page.querySelector(".tiles")).display,
    wide.map(one => one.outerHTML.slice(0, 80)), texts.map(one => one.textContent)]);
}};</script>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        pytest.skip("no Chromium on PATH")
    return found


def shown(chromium: str, page: Path, tmp_path: Path) -> str:
    command = [
        chromium, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom", "--virtual-time-budget=5000", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stdout[-2000:]
    return html.unescape(match[1])


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_and_its_style_is_taken(
    chromium: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    known = {"pruned": PRUNED, "retrained": RETRAINED}
    monkeypatch.setattr(inputs, "_fingerprint", lambda place: known[place.name])
    long = "organisation-with-a-long-name/a-model-with-a-name-that-takes-more-than-a-line-of-a-telephone-7B"
    report(folder_of_all(tmp_path / "work", dense=long), out=tmp_path / "page.html")
    frame = tmp_path / "frame.html"
    frame.write_text(_FRAME.format(width=width, page=html.escape((tmp_path / "page.html").read_text())))
    found = shown(chromium, frame, tmp_path)
    assert found.startswith("["), "the page's policy let the frame's script not in, or the page is empty"
    whole, inner, display, wide, texts = json.loads(found)
    assert display == "grid"  # the style's hash is the one that the policy names
    assert whole <= inner
    assert wide == []
    assert texts == []
