"""The guide as pages: built without a network, opened from its files in Chromium: search, links, light and dark, version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("material", reason="mkdocs-material is not installed")
ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SECONDS = 60_000  # milliseconds; a busy machine


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pages, as `make docs` builds them."""
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


class Page(HTMLParser):
    """What a page names: its anchors, its links, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") not in ("prev", "next", "canonical"):
            self.loaded.append(found["href"])
        elif "src" in found:
            self.loaded.append(found["src"])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_link_leads_to_a_place_that_is_there(pages: dict[Path, Page]) -> None:
    assert len(pages) > 25
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or link in ("", "."):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append(f"{path.name}: {link}")
    assert broken == []


def test_a_page_loads_nothing_from_elsewhere(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for url in page.loaded:
            assert not urlsplit(url).scheme, f"{path.name} loads {url}"
            assert not url.startswith("//"), f"{path.name} loads {url}"
            assert (path.parent / urlsplit(url).path).exists(), f"{path.name} loads {url}"


def test_reference_and_notebooks_are_pages_with_links_to_them(site: Path, pages: dict[Path, Page]) -> None:
    start = pages[site / "index.html"]
    for name in ("reference/python.html", "notebooks/five-minutes.html", "notebooks/heal-and-compare.html"):
        assert site / name in pages
        assert name in start.links
    assert {"score", "retrain_lora", "shortstackerror"} <= pages[site / "reference/python.html"].anchors
    assert (site / "notebooks/five-minutes.ipynb").is_file()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH")
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, site: Path) -> Iterator[Any]:
    """The first page, opened from its file by a reader without a network; fails where anything else was asked for."""
    context = browser.new_context(offline=True, color_scheme="light")
    opened = context.new_page()
    opened.set_default_timeout(SECONDS)
    asked: list[str] = []
    faults: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
    opened.goto((site / "index.html").as_uri())
    yield opened
    context.close()
    assert faults == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.mark.browser
def test_the_search_finds_without_a_network(page: Any) -> None:
    page.locator("[data-md-component=search-query]").click()
    page.keyboard.type("retrain_lora")
    hit = page.locator(".md-search-result__link").first
    hit.wait_for()
    assert re.match(r"\d+ matching documents?", page.locator(".md-search-result__meta").inner_text())
    hit.click()
    page.wait_for_url("**/*.html*")
    page.wait_for_function("document.querySelector('h1') && !location.pathname.endsWith('index.html')")
    assert "retrain_lora" in page.locator("article").inner_text()


@pytest.mark.browser
def test_light_and_dark(page: Any) -> None:
    def scheme() -> str:
        return str(page.locator("body").get_attribute("data-md-color-scheme"))

    def background() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    assert scheme() == "default"
    light = background()
    page.emulate_media(color_scheme="dark")  # as the reader's system has it
    page.wait_for_function("document.body.dataset.mdColorScheme === 'slate'")
    assert background() != light
    page.emulate_media(color_scheme="light")
    page.wait_for_function("document.body.dataset.mdColorScheme === 'default'")
    for expected in ("default", "slate"):  # and by the switch
        page.locator("form[data-md-component=palette] label:visible").click()
        page.wait_for_function(f"document.body.dataset.mdColorScheme === '{expected}'")


@pytest.mark.browser
def test_the_version_is_shown(page: Any) -> None:
    assert f"shortstack {VERSION}" in page.locator("header").inner_text()
    assert f"shortstack {VERSION}" in page.locator("footer").inner_text()
