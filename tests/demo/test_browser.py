"""The page in a real browser: Chromium of the system, driven by playwright; skipped where one of them is not there.

Pictures of what was seen are written into the folder that SHORTSTACK_SCREENSHOTS names, for a person to look at.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shortstack.pruning.prune import prune

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'shortstack[demo]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
SECONDS = 60_000  # milliseconds; a busy machine
sync_api.expect.set_options(timeout=SECONDS)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The small model of the package, dense and pruned, and a checkpoint that is not there."""
    folder = tmp_path_factory.mktemp("demo")
    prune("embedded", blocks="5,7", out=folder / "pruned", quiet=True)
    command = [
        sys.executable,
        "-m",
        "shortstack",
        "demo",
        "embedded",
        str(folder / "pruned"),
        str(folder / "gone"),
        "--port",
        "0",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found = next(filter(None, (re.search(r"http://127\.0\.0\.1:\d+/", line) for line in process.stderr)), None)
        assert found, "no page was served"
        yield found[0]
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for all."""
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Opens the page as a new visitor; fails where it asked for anything from outside, or ran a script of somebody else."""
    contexts, faults = [], []

    def seen(asked: Any) -> None:
        if not asked.url.startswith((address, "data:", "blob:")):
            faults.append(f"asked for {asked.url}")

    def get(**how: Any) -> Any:
        context = browser.new_context(**how)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SECONDS)
        page.on("request", seen)
        page.on("dialog", lambda dialog: (faults.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(address)
        page.wait_for_selector("#prompt textarea")
        sync_api.expect(page.locator("#chart")).to_contain_text("The speed of each run")  # the last piece that is drawn
        return page

    yield get
    folder = os.environ.get("SHORTSTACK_SCREENSHOTS")
    for number, context in enumerate(contexts):
        if folder:
            context.pages[0].screenshot(path=f"{folder}/{request.node.name}-{number}.png", full_page=True)
        context.close()
    assert faults == []


def settings(page: Any, **values: object) -> None:
    """Open the settings and fill them in: once more, where the page drew its own value over one."""
    page.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        field = page.locator(f"#{name} input[type=number]").first
        for attempt in range(10):
            field.fill(str(value))
            field.press("Tab")
            try:
                sync_api.expect(field).to_have_value(str(value), timeout=2000)
                break
            except AssertionError:
                if attempt == 9:
                    raise


def finished(page: Any, column: int) -> str:
    """The measures of a run that has ended."""
    said = page.locator(f"#said-{column}")
    sync_api.expect(said).to_contain_text("peak memory", timeout=SECONDS)
    return str(said.inner_text())


def text(page: Any, column: int) -> str:
    return str(page.locator(f"#text-{column} textarea").input_value())


def test_all_columns_write_and_a_broken_one_says_why(visit: Callable[..., Any]) -> None:
    page = visit(viewport={"width": 1280, "height": 900})
    sync_api.expect(page.get_by_role("img", name="blocks 0-4, 6, 8-11 of 0-11 are here")).to_be_visible()
    sync_api.expect(page.get_by_role("alert")).to_contain_text("no such directory")
    page.get_by_text("To make a good cup of tea, first").click()  # an example
    sync_api.expect(page.locator("#prompt textarea")).to_have_value("To make a good cup of tea, first")
    page.click("#generate-all")
    assert "tokens/s" in finished(page, 0)
    assert "first token after" in finished(page, 1)
    sync_api.expect(page.locator("#chart tbody tr")).to_have_count(2)
    assert page.locator("#generate-2").is_disabled()


def test_the_same_seed_gives_the_same_text_to_two_visitors_at_once(visit: Callable[..., Any]) -> None:
    pages = [visit(), visit()]
    for page in pages:
        settings(page, seed=3, new_tokens=48, batch=2)
    for page in pages:
        page.click("#generate-0")
    for page in pages:
        finished(page, 0)
    assert text(pages[0], 0) == text(pages[1], 0) != ""
    assert "[2] " in text(pages[0], 0)
    field = pages[0].locator("#seed input[type=number]").first
    field.fill("4")
    field.press("Tab")
    before = text(pages[0], 0)
    pages[0].click("#generate-0")
    sync_api.expect(pages[0].locator("#chart tbody tr")).to_have_count(2)
    assert text(pages[0], 0) != before


def test_stop_stops(visit: Callable[..., Any]) -> None:
    page = visit()
    settings(page, new_tokens=220, batch=8, temperature=2, top_k=1000, top_p=1)
    page.click("#generate-0")
    sync_api.expect(page.locator("#said-0")).to_contain_text("tokens/s")
    page.click("#stop")
    assert "stopped" in finished(page, 0)


def test_markup_in_a_prompt_is_text_and_long_or_empty_prompts_are_errors(visit: Callable[..., Any]) -> None:
    page = visit()
    prompt = page.locator("#prompt textarea")
    prompt.fill('<script>alert(1)</script><img src=x onerror="alert(2)">')
    page.click("#generate-1")
    finished(page, 1)
    prompt.fill("x" * 5000)
    assert len(prompt.input_value()) <= 4000
    prompt.fill("word " * 700)
    page.click("#generate-1")
    sync_api.expect(page.locator("#said-1")).to_contain_text("positions")
    prompt.fill("  ")
    page.click("#generate-1")
    sync_api.expect(page.locator("#said-1")).to_contain_text("the prompt is empty")


def test_narrow_and_dark(visit: Callable[..., Any]) -> None:
    narrow = visit(viewport={"width": 380, "height": 800})
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 380
    for tab, option in (("Block scores", "--scores"), ("Evaluation", "--results")):
        narrow.get_by_role("tab", name=tab).click()
        sync_api.expect(narrow.get_by_text(f"shortstack demo MODEL {option}")).to_be_visible()
    dark = visit(color_scheme="dark")
    assert dark.evaluate("document.body.classList.contains('dark')")


def test_the_keyboard_reaches_everything(visit: Callable[..., Any]) -> None:
    page = visit()
    page.locator("#prompt textarea").focus()
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"generate-all", "stop", "generate-0", "generate-1"} <= reached
    page.locator("#generate-0").focus()
    page.keyboard.press("Enter")
    finished(page, 0)
