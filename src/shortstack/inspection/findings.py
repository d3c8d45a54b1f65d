"""The findings of a check: nothing is reported as correct that was not checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from shortstack.common.shown import Shown

Status = Literal["ok", "fail", "note", "skip"]
_MARKS: dict[Status, tuple[str, str]] = {
    "ok": ("ok  ", "32"),
    "fail": ("FAIL", "31"),
    "note": ("note", "33"),
    "skip": ("skip", "33"),
}


@dataclass(frozen=True)
class Finding:
    """One line of a check.

    Attributes:
        what: What was checked.
        status: `ok`, `fail`, `note` (unusual, but possibly intended), or `skip` (not checked).
        says: What the check found, or why it was skipped.
    """

    what: str
    status: Status
    says: str


@dataclass(frozen=True, repr=False)
class CheckResult(Shown):
    """The findings of a check. The exit code of the command is 1 if a check failed.

    Attributes:
        source: The checkpoint, as it was named in the call.
        findings: One entry for each check.
    """

    source: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 if a check failed, else 0."""
        return int(any(finding.status == "fail" for finding in self.findings))

    @property
    def not_checked(self) -> list[Finding]:
        """The checks that were skipped, with the reason."""
        return [finding for finding in self.findings if finding.status == "skip"]

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "schema": 1,
            "source": self.source,
            "ok": not self.exit_code,
            "complete": not self.not_checked,
            "findings": [asdict(f) for f in self.findings],
        }

    def table_rows(self) -> list[dict[str, Any]]:
        """One row for each check."""
        return [asdict(finding) for finding in self.findings]

    def to_text(self) -> str:
        """One line for each check."""
        width = max(len(finding.what) for finding in self.findings)
        lines = [self.source]
        lines += [f"  {_MARKS[f.status][0]}  {f.what.ljust(width)}  {f.says}" for f in self.findings]
        failed = sum(finding.status == "fail" for finding in self.findings)
        made = len(self.findings) - len(self.not_checked)
        last = f"{failed} of {made} checks failed" if failed else f"nothing failed in {made} checks"
        return "\n".join([*lines, f"{last}, {len(self.not_checked)} skipped" if self.not_checked else last])

    def coloured(self, text: str) -> str:
        """The same text with coloured marks, for a terminal."""
        for mark, code in _MARKS.values():
            text = text.replace(f"\n  {mark}  ", f"\n  \x1b[{code}m{mark}\x1b[0m  ")
        return text


class Findings(list[Finding]):
    """The lines of a check that is being made."""

    def add(self, what: str, status: Status, says: str) -> None:
        """Add a line."""
        self.append(Finding(what, status, says))
