"""A report: what it says, what it holds, what it refuses, and that it is there whole or not at all."""

from __future__ import annotations

import errno
import html.parser
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from shortstack.cli.app import run
from shortstack.errors import ShortstackError, UsageError
from shortstack.publishing.report import inputs
from shortstack.publishing.report.report import report
from shortstack.runtime import atomic_output
from tests.publishing.report import material
from tests.publishing.report.material import DENSE, PRUNED, bench, folder_of_all, plan, ppl, save, scores


@pytest.fixture(autouse=True)
def _known_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoints of these tests have no weights to make a fingerprint of."""
    known = {"pruned": PRUNED, "retrained": material.RETRAINED}
    monkeypatch.setattr(inputs, "_fingerprint", lambda place: known.get(re.match(r"[a-z]*", place.name)[0]))


class Page(html.parser.HTMLParser):
    """What a browser would see: elements, their attributes, texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def whole(tmp_path: Path) -> tuple[str, Page, Any]:
    found = report(folder_of_all(tmp_path / "work"), out=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    return text, Page(text), found


def test_the_verdict_is_made_of_the_figures(whole: tuple[str, Page, Any]) -> None:
    _, page, found = whole
    assert found.title == "org/tiny without 1 of its 4 blocks"
    for part in (
        "1 of the 4 blocks of org/tiny are removed (1, chosen by ppl)",
        "parameters from 1.2k to 900 (-25.0%)",
        "The retraining (lora) took 2 steps with 400 tokens.",
        "pruned is 1.25 ±0.0", "retrained is 1.25",  # times as fast
        "Perplexity on texts: dense 7.768, pruned 10.56 (+36.0% ±", "retrained 7.768 (+0.0% ±",
    ):  # fmt: skip
        assert part in found.verdict, part
        assert part in page.text
    noise = found.verdict.partition("Within noise")[2]
    assert "perplexity, windows of 16 of retrained" in noise
    assert "perplexity, windows of 16 of pruned" not in noise
    assert "boolq acc of pruned" in noise  # rows that went both ways


def test_the_page_holds_all_that_there_is(whole: tuple[str, Page, Any]) -> None:
    text, page, _ = whole
    for heading in (
        "What was removed, and why", "Quality", "Retraining", "Speed and memory", "Samples",
        "Sources, and how to reproduce the results",
    ):  # fmt: skip
        assert heading in page.text
    assert [one["class"] for one in page.named("li") if (one.get("title") or "").startswith("block ")] == [
        "protected", "removed", "kept", "protected",
    ]  # fmt: skip
    assert "Order of removal: 1" not in page.text  # a removed block is marked
    assert "✕ 1" in page.text
    assert "◆ 0" in page.text
    assert "validation loss" in page.text
    assert "upon <b>d</b> /a/b/c" in page.text  # a sample is as the model wrote it
    assert text.count("<svg ") == len(page.named("title")) - 1  # each plot has a title, and the page has one
    assert len(page.named("desc")) == text.count("<svg ")
    assert "≈" in page.text


def test_the_page_loads_nothing_and_runs_nothing(whole: tuple[str, Page, Any]) -> None:
    text, page, _ = whole
    policy = next(one for one in page.named("meta") if one.get("http-equiv") == "Content-Security-Policy")["content"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert not {tag for tag, _ in page.elements} & {"script", "img", "link", "iframe", "object", "form", "a", "base"}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "href")]
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_no_path_of_this_disk_is_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "home" / "somebody" / "secret"
    folder_of_all(work, dense=f"{work}/models/tiny")
    note = ppl(f"{work}/other", "c" * 64, notes=[f"see {work}/notes.txt, hf_abcdefgh12345678"])
    save(work / "more.json", note)
    assert run(["report", str(work), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    for part in ("somebody", str(tmp_path), "secret/", "hf_abcdefgh"):
        assert part not in text
    assert "tiny without 1 of its 4 blocks" in text
    assert "No record shows how other was made" in text  # and who reads it is told


@pytest.mark.fault(75)
def test_names_with_markup_are_text_wherever_they_are_shown(tmp_path: Path) -> None:
    bad = '"><img src=x onerror=alert(1)><script>alert(2)</script>'
    work = folder_of_all(tmp_path / "work", dense=bad, suffix=bad.replace("/", ""))
    ranked = scores(
        source=bad, criteria={f"ppl{bad}": scores().criteria["ppl"]}, calibration={"source": bad, "sampling": bad}
    )
    ranked.save(work / "scores.json")
    (work / "plan.json").write_text(json.dumps(plan(source=bad, criterion=bad).to_json()))
    data = {"source": bad, "sha256": "9" * 64}
    figures = {f"ppl{bad}": ppl(bad, DENSE).figures["ppl_16"]}
    save(work / "more.json", ppl(bad, DENSE, data=data, figures=figures, notes=[bad], per_item={}),
         ppl(f"other{bad}", "c" * 64, data=data, figures=figures, per_item={}))  # fmt: skip
    save(work / "samples.json", material.samples(bad, DENSE, bad))
    marked = bench(bad, DENSE, [1.0, 1.1])
    marked.settings["engine"] = marked.settings["prompt"] = bad
    save(work / "bench.json", marked, bench(f"other{bad}", "c" * 64, [0.9, 1.0]))
    report(work, out=tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert not {tag for tag, _ in page.elements} & {"script", "img"}
    assert not [attributes for _, attributes in page.elements if any(name.startswith("on") for name in attributes)]
    assert page.text.count("<img src=x onerror=alert(1)>") > 10


def test_the_same_files_make_the_same_page(tmp_path: Path) -> None:
    work = folder_of_all(tmp_path / "work")
    pages = []
    for name in ("one.html", "two.html"):
        report(work, out=tmp_path / name)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_published_figures_stand_beside(tmp_path: Path) -> None:
    texts = {"source": "wikitext2", "sha256": "1" * 64}
    figures = {"ppl_128": ppl("org/tiny", DENSE).figures["ppl_16"]}
    file = save(tmp_path / "ppl.json", ppl("org/tiny", DENSE, data=texts, figures=figures, per_item={}))
    report(file, out=tmp_path / "page.html", published="vicuna-7b-v1.3")
    assert "published vicuna-7b-v1.3" in Page((tmp_path / "page.html").read_text()).text
    with pytest.raises(UsageError, match="no such published model"):
        report(file, out=tmp_path / "other.html", published="vicuna-7b-v9")
    assert not (tmp_path / "other.html").exists()


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(plan().to_json()))
    found = report(tmp_path / "plan.json", out=tmp_path / "page.html")
    assert found.verdict.endswith("Speed and memory were not measured. Quality was not measured.")
    save(tmp_path / "ppl.json", ppl("somewhere/pruned", PRUNED), ppl("somewhere/retrained", material.RETRAINED))
    found = report(tmp_path / "plan.json", tmp_path / "ppl.json", out=tmp_path / "page.html")
    assert found.notices[0].startswith("There is no result of the dense model")
    assert found.notices[0] in Page((tmp_path / "page.html").read_text()).text


@pytest.mark.fault(116)
def test_records_of_different_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(plan().to_json()))
    scores(source="org/other", fingerprint="e" * 64).save(tmp_path / "scores.json")
    with pytest.raises(ShortstackError, match="different models: their fingerprints differ") as caught:
        report(tmp_path / "plan.json", tmp_path / "scores.json", out=tmp_path / "page.html")
    assert "org/other" in caught.value.message
    assert "org/tiny" in caught.value.message
    (tmp_path / "other.json").write_text(json.dumps(plan(removed=(2,)).to_json()))
    with pytest.raises(ShortstackError, match="two ways to shorten org/tiny"):
        report(tmp_path / "plan.json", tmp_path / "other.json", out=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.fault(116)
def test_figures_of_other_texts_or_tokenizers_get_no_difference(tmp_path: Path) -> None:
    other_text = ppl("org/pruned", PRUNED, data={"source": "other texts", "sha256": "8" * 64})
    found = report(save(tmp_path / "a.json", ppl("org/tiny", DENSE), other_text), out=tmp_path / "page.html")
    assert "No quality figure can be compared between two models" in found.verdict
    other_tokens = ppl("org/gemma", "c" * 64, settings={"tokenizer": "u" * 64, "bos_token": 2})
    found = report(save(tmp_path / "b.json", ppl("org/tiny", DENSE), other_tokens), out=tmp_path / "page.html")
    assert "No quality figure can be compared between two models" in found.verdict
    assert "they differ in the tokenizer and the BOS rule" in Page((tmp_path / "page.html").read_text()).text


def _damaged(work: Path) -> list[tuple[str, str]]:
    """(file, its content), each damaged in another way."""
    record = json.loads((work / "ppl.json").read_text())
    times = json.loads((work / "bench.json").read_text())
    written = json.loads((work / "samples.json").read_text())
    del times[0]["settings"]["engine"]
    record[0]["per_item"]["ppl_16"] = ["two", None]
    written[0]["per_item"]["texts"] = [3]
    nothing = {**record[1], "parameters": 0}
    return [
        ("ppl.json", (work / "ppl.json").read_text()[:-40]),
        ("ppl.json", json.dumps(record)),
        ("ppl.json", json.dumps([nothing])),
        ("ppl.json", json.dumps([{"figures": 3}])),
        ("bench.json", json.dumps(times)),
        ("samples.json", json.dumps(written)),
        ("plan.json", json.dumps({"removed": [], "kept": 3})),
        ("scores.json", json.dumps({"criteria": {"ppl": 1}, "model": {}})),
        ("retrained/metrics.jsonl", '{"step": "one"}'),
        ("retrained/retraining.json", '{"models": {"before": {}}}'),
        ("pruned/shortstack.json", '{"kept_blocks": [2, 1]}'),
    ]


@pytest.mark.fault(117)
@pytest.mark.parametrize("number", range(11))
def test_a_damaged_file_is_named(tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    work = folder_of_all(tmp_path / "work")
    name, content = _damaged(work)[number]
    (work / name).write_text(content)
    assert run(["report", str(work), "--out", str(tmp_path / "page.html")]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {work / name}: ")
    assert "hint: " in shown
    assert not (tmp_path / "page.html").exists()


@pytest.mark.fault(118)
@pytest.mark.parametrize("place", ["in the middle", "at the end"])
def test_a_full_disk_leaves_the_report_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    work, out = folder_of_all(tmp_path / "work"), tmp_path / "page.html"
    report(work, out=out)
    before = out.read_bytes()

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    opened = Path.open
    if place == "in the middle":
        monkeypatch.setattr(
            Path,
            "open",
            lambda self, mode="r", *a, **k: Full(self, "w") if "w" in mode else opened(self, mode, *a, **k),
        )
    else:
        monkeypatch.setattr(atomic_output, "flush", no_room)
    for target in (out, tmp_path / "new.html"):
        with pytest.raises(ShortstackError, match="no space left on device"):
            report(work, out=target)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "work"]


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "info.json").write_text("{}")
    with pytest.raises(ShortstackError, match="no records that a report can show"):
        report(tmp_path, out=tmp_path / "page.html")
    with pytest.raises(ShortstackError, match="cannot be read"):
        report(tmp_path / "absent.json", out=tmp_path / "page.html")
    with pytest.raises(UsageError, match="no run and no files given"):
        report(out=tmp_path / "page.html")


def test_what_is_no_part_of_it_is_named(tmp_path: Path) -> None:
    work = folder_of_all(tmp_path / "work")
    (work / "info.json").write_text('{"family": "llama"}')
    found = report(work, out=tmp_path / "page.html")
    assert found.left_out == ["info.json"]
    assert "not used in the report: info.json" in found.to_text()


def test_a_run_folder_is_read_in_its_order_and_nothing_outside_of_it(tmp_path: Path) -> None:
    work = folder_of_all(tmp_path / "run")
    steps = {name: {"state": "done", "output": f"{name}.json"} for name in ("scores", "plan", "ppl")}
    steps["pruned"] = {"state": "done", "output": "pruned", "command": "shortstack prune org/tiny --out pruned"}
    steps["later"] = {"state": "begun", "output": "bench.json"}
    record = {"schema": 1, "recipe": "mine", "model": "org/tiny", "order": [*steps], "steps": steps}
    (work / "run.json").write_text(json.dumps(record))
    found = report(work, out=tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert "Speed and memory were not measured." in found.verdict  # that step is not done
    assert "shortstack run mine --model org/tiny --out RUN" in page.text
    assert "shortstack prune org/tiny --out pruned" in page.text
    steps["ppl"]["output"] = "../outside.json"
    (tmp_path / "outside.json").write_text((work / "ppl.json").read_text())
    (work / "run.json").write_text(json.dumps(record))
    with pytest.raises(ShortstackError, match="is outside of the folder of the run"):
        report(work, out=tmp_path / "page.html")


def test_an_adapters_folder_shows_its_training(tmp_path: Path) -> None:
    work = folder_of_all(tmp_path / "work")
    (work / "lora").mkdir()
    (work / "lora/shortstack.json").write_text('{"files": {}}')
    (work / "lora/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}')
    report(work, out=tmp_path / "page.html")
    assert "Training of lora" in Page((tmp_path / "page.html").read_text()).text


def test_plots_alone(tmp_path: Path) -> None:
    found = report(folder_of_all(tmp_path / "work"), png=tmp_path / "plots")
    assert found.out is None
    names = {path.name for path in found.plots}
    assert {"scores-ppl.png", "perplexity.png", "accuracy.png", "training-retrained.png", "memory.png"} <= names
    for path in found.plots:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "work/report.html").exists()


@pytest.mark.fault(133)
@pytest.mark.parametrize("name", ["ppl.json", "run.json"])
def test_a_file_of_the_folder_is_not_written_over(name: str, tmp_path: Path) -> None:
    """The folder alone was given; what is found in it is an input, too."""
    save(tmp_path / "ppl.json", ppl("org/tiny", DENSE))
    if name == "run.json":
        (tmp_path / name).write_text(
            '{"recipe": "r", "order": ["eval"], "steps": {"eval": {"state": "done", "output": "ppl.json"}}}'
        )
    before = (tmp_path / name).read_bytes()
    with pytest.raises(ShortstackError, match="is the input, which is never touched"):
        report(tmp_path, out=tmp_path / name)
    assert (tmp_path / name).read_bytes() == before


def test_links_in_a_circle_are_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to("b.json")
    (tmp_path / "b.json").symlink_to("a.json")
    with pytest.raises(ShortstackError, match="cannot be read"):
        report(tmp_path / "a.json", out=tmp_path / "page.html")


def test_named_sources_are_a_heat_map(tmp_path: Path) -> None:
    """A cell per block and source with its figure, as SVG and as a picture; without sources there is none."""
    from dataclasses import replace

    from shortstack.publishing.report.plots import HeatMap, source_map

    plain = material.scores().criteria["ppl"]
    assert source_map(plain, (1,), (0, 3)) is None
    of_sources = {
        name: replace(plain, scores=tuple(one * by for one in plain.scores)) for name, by in (("a", 1.0), ("b", 1.1))
    }
    scores = material.scores(criteria={"ppl": replace(plain, sources=of_sources)})
    scores.save(tmp_path / "scores.json")
    report(tmp_path / "scores.json", out=tmp_path / "report.html", png=tmp_path / "png")
    html = (tmp_path / "report.html").read_text()
    assert html.count('class="cell"') == 8
    assert "4 windows each of 16 tokens" not in html  # its record names no sources
    assert (tmp_path / "png/sources-ppl.png").stat().st_size > 1000
    plot = source_map(scores.criteria["ppl"], (1,), (0, 3))
    assert isinstance(plot, HeatMap)
    assert [label for label, _ in plot.rows] == ["◆ 0", "✕ 1", "2", "◆ 3"]
    assert plot.rows[1][1][1] == (plot.rows[1][1][1][0], "+18.9%")  # 8.8 / 7.4
