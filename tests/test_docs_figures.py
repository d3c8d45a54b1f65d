"""A figure that stands in several places is the same everywhere, and the one of the first page is one that was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from shortstack.baselines.figures import published_result
from shortstack.inspection.families import families
from shortstack.inspection.info import info
from shortstack.recipes.quickstart import card_perplexity

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): " ".join(path.read_text().split())
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
RESULTS = PAGES["docs/results.md"]


def stated(pattern: str, *, at_least: int = 1) -> dict[str, set[tuple[str, ...]]]:
    """Page -> what the groups of a pattern hold there, of every page that states it."""
    found = {name: set(re.findall(pattern, text)) for name, text in PAGES.items()}
    found = {
        name: {one if isinstance(one, tuple) else (one,) for one in values} for name, values in found.items() if values
    }
    assert len(found) >= at_least, f"{pattern} stands on {sorted(found)} alone"
    return found


def test_the_number_of_families() -> None:
    expected = str(families().counted("causal"))
    for name, values in stated(r"(\d+) (?:decoder-only |architectures)", at_least=4).items():
        assert values == {(expected,)}, name


def test_the_model_in_the_package() -> None:
    """Perplexities of the quickstart: one dense, one pruned, one retrained, wherever they stand."""
    dense, pruned, retrained = (
        re.search(rf"\| {row}[^|]*\| \d+ \| [\d,]+ \| [\d.]+ MB \| ([\d.]+)", RESULTS)[1]  # type: ignore[index]
        for row in ("dense", "pruned", "retrained")
    )
    assert float(dense) == pytest.approx(card_perplexity(), abs=0.005)
    for name, values in stated(r"dense\s+12\s+2\.62M\s+5\.25 MB\s+([\d.]+)").items():
        assert values == {(dense,)}, name
    for name, values in stated(r"(?:pruned|retrained)\s+9\s+2\.03M\s+-22\.5%\s+4\.07 MB\s+([\d.]+)").items():
        assert values == {(pruned,), (retrained,)}, name
    for name, values in stated(r"perplexity (\d+\.\d+) becomes (\d+\.\d+), and (\d+\.\d+) after").items():
        assert values == {(dense, pruned, retrained)}, name
    facts = info("embedded")
    for name, values in stated(r"\| dense \| 12 \| ([\d,]+) \| ([\d.]+) MB").items():
        assert values == {(f"{facts.parameters:,}", f"{facts.nbytes / 1e6:.2f}")}, name


def test_the_real_model_on_the_first_pages_is_as_measured() -> None:
    """README, index and the short table of the results against the tables below it."""
    short, tables = RESULTS.split("## Speed of shortstack itself")
    dense = re.search(r"\| 134\.5 M \(dense\) \| ([\d.]+) ", tables)
    three, six = (re.search(rf"\({count} blocks' worth, [\d.]+ %\) \| ([\d.]+) ", tables) for count in (3, 6))
    assert dense
    assert three
    assert six
    assert f"perplexity {dense[1]} becomes {three[1]} " in short
    assert f"perplexity {dense[1]} becomes {six[1]} " in short
    bits = re.search(r"\| W8A16 \(GPTQ\) \| (\d+) MB \| ([\d.]+) ", tables)
    whole = re.search(r"\| dense \| (269) MB \| ([\d.]+) ", tables)
    assert bits
    assert whole
    for page in (PAGES["README.md"], PAGES["docs/index.md"]):
        assert f"perplexity {dense[1]} becomes {three[1]} " in page
        assert f"{whole[1]} MB become {bits[1]} MB, perplexity {whole[2]} becomes {bits[2]}" in page
    assert f"{whole[1]} MB become {bits[1]} MB" in short
    assert f"{whole[2]} becomes {bits[2]}" in short


def test_published_figures_are_those_in_the_package() -> None:
    dense, pruned = published_result("vicuna-7b-v1.3"), published_result("st-vicuna-v1.3-5.5b-ppl")
    key = ("ppl", "wikitext2", "ppl_128")
    said = f"perplexity on WikiText2 {dense.figures[key]:.2f} becomes {pruned.figures[key]:.2f}"
    assert said in RESULTS
    assert f"{dense.parameters / 1e9:.2f} B parameters become {pruned.parameters / 1e9:.2f} B" in RESULTS


def test_a_figure_of_the_short_page_is_in_the_full_tables() -> None:
    """Each number of the page's table of speed stands in the measurements that it sums up."""
    table = RESULTS.partition("## Speed of shortstack itself")[2].partition("## ")[0]
    full = PAGES["docs/measurements.md"]
    for number in re.findall(r"(\d+\.\d+) (?:times|GB|to)|(\d+) MB", table):
        value = next(filter(None, number))
        assert re.search(rf"(?<![\d.]){re.escape(value)}(?!\d)", full) or value == "1100", value
    assert "model_MB 1.1e+03" in full


def test_the_range_against_cp_in_the_readme_is_the_measured_one() -> None:
    (values,) = {
        frozenset(one)
        for one in stated(r"Pruning takes (\d\.\d) to (\d\.\d) times as long as `cp`", at_least=2).values()
    }
    ((low, high),) = values
    ratios = re.findall(r"`cp -r` and `sync`[^|]*\| \**([\d.]+) times the time \(Intel Xeon: ([\d.]+)", RESULTS)
    assert ratios
    assert (low, high) == (f"{float(ratios[0][0]):.1f}", "2.8")  # 2.72 and 2.75 on the Xeon
    assert "2.72 and 2.75 times `cp -r`" in PAGES["docs/measurements.md"]


def test_notebooks_and_pages_agree_on_the_size_of_the_model_in_the_package() -> None:
    million = f"{info('embedded').parameters / 1e6:.1f} M parameters"
    for path in (ROOT / "docs/notebooks").glob("*.ipynb"):
        text = "".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
        assert "M parameters" not in text or million in text, path.name


def test_the_cost_of_several_texts_in_the_guide_is_the_measured_one() -> None:
    """Choosing for the worst source: what the guide recommends by stands in the tables of the results."""
    results, guide = RESULTS.partition("## Choosing for several texts")[2], PAGES["docs/guide/choosing.md"]
    three, six = (results.partition(f"| {count} blocks, chosen by")[2].partition("The set")[0] for count in (3, 6))
    books, sums = re.search(r"perplexity (\+\d+ %) on books, (\+\d+ %) on sums", guide).groups()  # type: ignore[union-attr]
    row = re.search(r"\| `ppl` of books alone \| [\d, -]+ \| [^|]+ \| (\+\d+ %)[^|]+\| [^|]+\| (\+\d+ %)", three)
    assert row
    assert row.groups() == (books, sums)
    assert six
    added = re.search(
        r"from ([\d.]+) to ([\d.]+) of its dense loss.*?gave ([\d.]+)\. With six blocks .*? are\s+(.*?)\. So", guide
    )
    assert added
    assert f"adds {added[1]} of the dense loss" in results
    assert f"reduces this to {added[2]} " in results
    assert f"single costs gives {added[3]} " in results
    assert f"the three figures are {added[4]}:" in results


def test_figures_of_the_guide_that_are_measured_elsewhere() -> None:
    """Seconds, tokens, kills, blocks and tests: one number for each, on whatever page it stands."""
    for pattern, pages in (
        (r"(\d+) seconds (?:on 2 cores, without the installation|after installation)", 2),
        (r"(\d+) (?:tokens of Python 3.11.7's|predicted tokens in windows of 128)", 2),
        (r"(2,\d+|1,\d+|\d+) (?:kills\b|killed processes)", 3),
        (r"(\d+,\d{3}) random (?:inputs|headers)", 2),
        (r"Pruning needs less than (\d+) MB", 2),
    ):
        values = set().union(*stated(pattern, at_least=pages).values())
        assert len(values) == 1, (pattern, values)
    most = re.search(r"Pruning needs less than (\d+) MB", PAGES["README.md"])
    assert most
    for measured in re.findall(r"\| peak memory \| (\d+) MB", PAGES["docs/measurements.md"]):
        assert int(measured) < int(most[1])
