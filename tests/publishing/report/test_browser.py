"""The page in a real browser: its style is taken under its own policy, and nothing is wider than a telephone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shortstack.publishing.report import inputs
from shortstack.publishing.report.report import report
from tests.publishing.report.material import PRUNED, RETRAINED, folder_of_all

WIDTHS = (360, 1280)
# The page lies in frames as wide as screens; what is in it is measured from outside, since it runs no script itself.
_FRAMES = """<!DOCTYPE html><meta charset="utf-8"><body>{frames}<pre id="found"></pre>
<script>
onload = () => {{
  const measured = frame => {{
    const page = frame.contentDocument, root = page.documentElement;
    const wide = [...page.querySelectorAll("body *")].filter(one => !one.closest(".scroll") && !one.closest("svg") &&
      one.getBoundingClientRect().right > root.clientWidth + 1);
    const texts = [...page.querySelectorAll("svg text")].filter(one => {{
      const box = one.getBoundingClientRect(), around = one.ownerSVGElement.getBoundingClientRect();
      return box.left < around.left - 1 || box.right > around.right + 1;
    }});
    return [
      root.scrollWidth, root.clientWidth, page.defaultView.getComputedStyle(page.querySelector(".tiles")).display,
      wide.map(one => one.outerHTML.slice(0, 80)), texts.map(one => one.textContent)];
  }};
  document.querySelector("#found").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(measured));
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


@pytest.fixture(scope="module")
def measured(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The page at each width, in one Chromium."""
    folder, known = tmp_path_factory.mktemp("page"), {"pruned": PRUNED, "retrained": RETRAINED}
    long = "organisation-with-a-long-name/a-model-with-a-name-that-takes-more-than-a-line-of-a-telephone-7B"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "_fingerprint", lambda place: known[place.name])
        report(folder_of_all(folder / "work", dense=long), out=folder / "page.html")
    page = html.escape((folder / "page.html").read_text())
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{page}"></iframe>' for width in WIDTHS)
    (folder / "frames.html").write_text(_FRAMES.format(frames=frames))
    found = shown(chromium, folder / "frames.html", folder)
    assert found.startswith("["), "the page's policy let the frame's script not in, or the page is empty"
    values: list[Any] = json.loads(found)
    return values


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_its_style_is_taken(measured: list[Any], width: int) -> None:
    whole, inner, display, wide, texts = measured[WIDTHS.index(width)]
    assert display == "grid"  # the style's hash is the one that the policy names
    assert whole <= inner <= width
    assert wide == []
    assert texts == []
