"""Write a report: what was removed from a model and why, what was gained, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.baselines.figures import published_result
from shortstack.common.extras import need_packages
from shortstack.common.formatting import size
from shortstack.common.options import stage
from shortstack.common.shown import Shown
from shortstack.errors import UsageError
from shortstack.runtime.atomic_output import check_writable_file, write_file

_HINT = "shortstack report RUN --out report.html"


@dataclass(frozen=True, repr=False)
class WrittenReport(Shown):
    """The report that was written.

    Attributes:
        out: The HTML page; None if only plots were written.
        title: The title of the page.
        verdict: The first paragraph of the page.
        notices: The contradictions between the records.
        left_out: The files that do not belong in a report.
        plots: The plots that were written (`--png`).
        nbytes: The size of the page in bytes.
    """

    out: Path | None
    title: str
    verdict: str
    notices: list[str]
    left_out: list[str]
    plots: list[Path]
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "schema": 1,
            **self.__dict__,
            "out": None if self.out is None else str(self.out),
            "plots": [str(path) for path in self.plots],
        }

    def to_text(self) -> str:
        """The verdict, and the paths of the outputs."""
        lines = [self.title, "", self.verdict, *(f"note: {notice}" for notice in self.notices), ""]
        if self.left_out:
            lines.append(f"not used in the report: {', '.join(self.left_out)}")
        if self.plots:
            lines.append(f"plots: {', '.join(str(path) for path in self.plots)}")
        if self.out is not None:
            lines.append(f"the report is in {self.out} ({size(self.nbytes)}): open it in a browser")
        return "\n".join(lines)


@stage
def report(
    *sources: Path, out: Path | None = None, png: Path | None = None, published: str | None = None
) -> WrittenReport:
    """Write a report of a run as one HTML file: what was removed and why, what it cost, and how to do it again.

    The page is made only from records (scores, plan, results, training logs, shortstack.json). It loads nothing from
    elsewhere, runs no script, can be printed, and shows no folders of this machine.

    Args:
        sources: What to report: the folder of a recipe's run, checkpoints, folders of results, or files that score,
            plan, eval, bench and compare wrote.
        out: Write the page to this file. By default it is report.html in the current folder; with only `png`, no page
            is written.
        png: Write only the plots into this folder, as PNG files.
        published: Show these published models beside the figures, separated by commas, such as
            `st-vicuna-v1.3-5.5b-ppl`.

    Returns:
        The verdict, and what was written.

    Raises:
        ShortstackError: there is nothing to report, a file is damaged, or the files are about different models.
    """
    from shortstack.publishing.report.inputs import read_material
    from shortstack.publishing.report.page import make_report, page

    if not sources:
        raise UsageError("no run and no files given", hint=_HINT)
    out = Path("report.html") if out is None and png is None else out
    if out is not None:
        check_writable_file(Path(out))
    if png is not None:
        need_packages("report --png", "matplotlib", extra="report")
    names = [name.strip() for name in published.split(",") if name.strip()] if published else []
    made = make_report(read_material([Path(source) for source in sources], out), names)
    data = page(made).encode() if out is not None else b""
    if out is not None:
        write_file(Path(out), data)
    plots: list[Path] = []
    if png is not None:
        from shortstack.publishing.report.pictures import write_pictures

        plots = write_pictures(made, Path(png))
    left_out = made.material.left_out
    return WrittenReport(out, made.title, made.verdict.text, made.notices, left_out, plots, len(data))


def check_report(values: Mapping[str, Any]) -> list[str]:
    """Refuse names of published figures that do not exist, before anything runs.

    Raises:
        ShortstackError: there is no such figure.
    """
    for name in (values.get("published") or "").split(","):
        if name.strip():
            published_result(name.strip())
    return []
