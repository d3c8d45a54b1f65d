"""`shortstack push`: a checkpoint to the hub, after everything that can be checked here was checked."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.artifacts import provenance
from shortstack.checkpoint.hub import parse_hub_id
from shortstack.common.formatting import plain, size, table
from shortstack.common.options import stage
from shortstack.common.progress import Progress
from shortstack.common.shown import Shown
from shortstack.errors import ShortstackError, UsageError, first_line
from shortstack.inspection.check import check
from shortstack.inspection.findings import CheckResult, Finding, Findings
from shortstack.publishing.card_text import CARD, base_model_of
from shortstack.publishing.push_contents import Contents, contents_of


@dataclass(frozen=True, repr=False)
class PushResult(Shown):
    """The files that were pushed, or would be pushed.

    Attributes:
        directory: The checkpoint.
        repository: The repository, such as `org/name`.
        private: Whether the repository is private.
        contents: The files to push, and the files that are not pushed.
        findings: The findings of all checks.
        url: The address of the commit; empty after a dry run.
        notes: What was found and done on the hub.
    """

    directory: Path
    repository: str
    private: bool
    contents: Contents
    findings: list[Finding]
    url: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 if a check failed, else 0."""
        return CheckResult("", self.findings).exit_code

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "schema": 1, "directory": str(self.directory), "repository": self.repository, "private": self.private,
            "files": {file.name: file.nbytes for file in self.contents.files}, "left_out": self.contents.left_out,
            "findings": CheckResult("", self.findings).to_json()["findings"], "ok": not self.exit_code,
            "dry_run": not self.url, "url": self.url, "notes": self.notes,
        }  # fmt: skip

    def to_text(self) -> str:
        """The files with sizes, the files that are not pushed, the checks, and the next step."""
        files = self.contents.files
        whose = "a private repository" if self.private else "a public repository"
        total = size(sum(file.nbytes for file in files))
        rows = [[plain(file.name), size(file.nbytes)] for file in files]
        lines = [table([f"{len(files)} files", total], rows)]
        if self.contents.left_out:
            lines += ["", "not pushed:", *(f"  {plain(n)}: {why}" for n, why in self.contents.left_out.items())]
        lines += ["", CheckResult("checks", self.findings).to_text(), ""]
        if self.url:
            return "\n".join([*lines, *self.notes, f"pushed to {self.repository} ({whose}): {self.url}"])
        if self.exit_code:
            return "\n".join([*lines, "dry run: it cannot be pushed like this; correct what failed"])
        public = "" if self.private else " --public"
        again = f"shortstack push {shlex.quote(str(self.directory))} {self.repository}{public} --yes"
        return "\n".join([*lines, f"dry run: nothing was pushed. Into {whose}: {again}"])


@stage
def push(
    directory: Path,
    repository: str,
    *,
    yes: bool = False,
    public: bool = False,
    quick: bool = False,
    force: bool = False,
    quiet: bool = False,
) -> PushResult:
    """Upload a checkpoint that shortstack made to the hub; without --yes, only show what would be uploaded.

    The files that shortstack.json names are uploaded with card, licence and pictures in one commit, so the repository
    gets all of them or none. First the card and every recorded hash are checked, and that the model loads and
    generates. Files that look like secrets, temporary files and adapters are not uploaded, and local paths are removed
    from shortstack.json. If an upload is interrupted, the same command resumes it; files that have arrived are not sent
    again.

    Args:
        directory: A checkpoint that shortstack wrote.
        repository: The repository to push to, such as `org/name`.
        yes: Upload the files. Without this option nothing is sent.
        public: Make the repository public. By default it is private.
        quick: Skip weight files of 256 MB or more when checking.
        force: Replace the model of a repository even if shortstack did not make it.
        quiet: Show no progress on stderr.

    Returns:
        Files, checks and, after a push, the address. The exit code of the command is 1 if a check failed.

    Raises:
        ShortstackError: shortstack did not make the checkpoint, a check failed before the push, or the hub refused it.
    """
    directory = Path(directory)
    named = parse_hub_id(repository)
    if named is None or named[1] is not None or repository.count("/") != 1:
        raise UsageError(f"{repository}: expected the name of a repository, such as org/name")
    record = provenance.read(directory) if directory.is_dir() else None
    if record is None or not record["steps"]:
        raise ShortstackError(
            f"{directory}: not a checkpoint that shortstack made (no {provenance.FILE_NAME} with its steps)",
            hint="give a checkpoint that prune, retrain, merge or quantize wrote; `hf upload` uploads any folder",
        )
    contents = contents_of(directory, record, repository)
    findings = _findings(directory, record, contents)
    findings += check(str(directory), quick=quick, quiet=quiet).findings
    result = PushResult(directory, repository, not public, contents, findings)
    if not yes:
        return result
    if failed := [f"{finding.what}: {finding.says}" for finding in findings if finding.status == "fail"]:
        raise ShortstackError(
            f"{directory}: not pushed: {failed[0]}", hint="the same command without --yes shows all checks"
        )
    from shortstack.publishing.hub_upload import upload

    url, private, notes = upload(contents.files, repository, public=public, force=force, progress=Progress(quiet=quiet))
    return PushResult(directory, repository, private, contents, findings, url, notes)


def _findings(directory: Path, record: dict[str, Any], contents: Contents) -> Findings:
    """What was found about card and contents."""
    findings, renewed = Findings(), f"shortstack card {shlex.quote(str(directory))}"
    _check_card(findings, directory / CARD, renewed)
    if not base_model_of(record):
        findings.add("base model", "note", f"its id on the hub is not known: {renewed} --base-model ORG/NAME")
    if contents.paths:
        findings.add(
            "paths",
            "fail",
            f"{CARD} shows {contents.paths[0]}, a local path: {renewed} writes it again",
        )
    if contents.secrets:
        listed = ", ".join(contents.secrets)
        findings.add("secrets", "fail", f"what looks like an access token or a key is in {listed}: take it out")
    else:
        findings.add("secrets", "ok", "no access token or key in any text")
    return findings


def _check_card(findings: Findings, path: Path, renewed: str) -> None:
    from huggingface_hub import ModelCard

    if not path.is_file():
        findings.add("card", "fail", f"there is no {CARD}: {renewed} writes it")
        return
    try:
        data = ModelCard.load(path).data
    except Exception as error:  # whatever YAML or the card's classes raise
        findings.add("card", "fail", f"the metadata of {CARD} cannot be read: {plain(first_line(error))}")
        return
    findings.add("card", "ok", f"{len(data.to_dict())} entries of metadata")
    if not data.get("license"):
        findings.add("licence", "note", f"not stated: {renewed} --license NAME")
