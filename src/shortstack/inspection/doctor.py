"""What shortstack finds here to work with: versions, extras, devices, engines, caches. Nothing is downloaded or run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shortstack.artifacts.provenance import versions
from shortstack.common.formatting import plain, size
from shortstack.common.options import stage
from shortstack.common.shown import Shown
from shortstack.errors import first_line
from shortstack.inspection.findings import CheckResult, Findings
from shortstack.runtime import cgroups
from shortstack.runtime.devices import bfloat16_units
from shortstack.runtime.memory import available_bytes, installed_bytes
from shortstack.runtime.workspace import cache_folder

# Engines that are programs of their own -> what they may be called on PATH.
_ENGINES = {"vLLM": ("vllm",), "llama.cpp": ("llama-server", "llama-bench")}
_FOR_DEVELOPERS = ("all", "dev", "docs")
# Environment variables that change what shortstack or its libraries do; of a token never the value.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "SHORTSTACK_CACHE",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class DoctorResult(Shown):
    """The findings of each section. The exit code is 1 if a required package is missing or has a wrong version.

    Attributes:
        sections: The findings of each section, by its title.
    """

    sections: dict[str, Findings]

    @property
    def exit_code(self) -> int:
        """1 if a check failed, else 0."""
        return CheckResult("", [finding for found in self.sections.values() for finding in found]).exit_code

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        sections = {title: [asdict(finding) for finding in found] for title, found in self.sections.items()}
        return {"schema": 1, "ok": not self.exit_code, "sections": sections}

    def table_rows(self) -> list[dict[str, Any]]:
        """One row for each finding."""
        return [{"section": title, **asdict(finding)} for title, found in self.sections.items() for finding in found]

    def to_text(self) -> str:
        """One line for each finding, under the titles of the sections."""
        blocks = [CheckResult(title, found).to_text().rpartition("\n")[0] for title, found in self.sections.items()]
        last = "something that shortstack needs is missing" if self.exit_code else "all that shortstack needs is here"
        return "\n\n".join([*blocks, last])

    def coloured(self, text: str) -> str:
        """The same text with coloured marks, for a terminal."""
        return CheckResult("").coloured(text)


@stage
def doctor() -> DoctorResult:
    """Show versions, devices, extras, engines, and caches with their sizes, for a bug report.

    Nothing is downloaded, written or run. The output states whether a hub token is set, but never shows the token.

    Returns:
        One line for each version, device, extra and cache. The exit code of the command is 1 if a required package is
        missing or has a wrong version.
    """
    found = {
        "versions": _versions(), "extras": _extras(), "devices": _devices(), "engines": _engines(), "caches": _caches(),
        "hub and environment": _environment(),
    }  # fmt: skip
    return DoctorResult(found)


def _versions() -> Findings:
    """The versions that figures depend on, and every requirement of the core that is not met."""
    findings = Findings()
    findings.add("system", "ok", f"{platform.system()} {platform.release()} {platform.machine()}")
    for name, version in versions("huggingface_hub").items():
        findings.add(name, "ok", version)
    for name, found, wanted in _requirements(""):
        if found is None or not wanted.contains(found, prereleases=True):
            findings.add(name, "fail", f"{found or 'not installed'}, needed: {wanted}: pip install '{name}{wanted}'")
    return findings


def _extras() -> Findings:
    findings = Findings()
    metadata = importlib.metadata.metadata("shortstack")
    for extra in sorted(set(metadata.get_all("Provides-Extra") or []) - set(_FOR_DEVELOPERS)):
        wanted = list(_requirements(extra))
        lacking = [
            name for name, found, needed in wanted if found is None or not needed.contains(found, prereleases=True)
        ]
        if lacking:
            findings.add(extra, "note", f"without {', '.join(lacking)}: pip install 'shortstack[{extra}]'")
        else:
            findings.add(extra, "ok", ", ".join(f"{name} {found}" for name, found, _ in wanted))
    return findings


def _requirements(extra: str) -> Iterator[tuple[str, str | None, Any]]:
    """(package, version that is installed or None, versions that are needed) of the core, or of an extra."""
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires("shortstack") or []:
        requirement = Requirement(line)
        of_extra = requirement.marker is not None and "extra" in str(requirement.marker)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if not applies or of_extra != bool(extra):
            continue
        try:
            found: str | None = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        yield requirement.name, found, requirement.specifier


def _devices() -> Findings:
    import torch

    from shortstack.engine.cpu import library_for

    findings = Findings()
    memory = f"{size(available_bytes())} of {size(installed_bytes())} free"
    limit = cgroups.memory_limit()
    limited = f", limited to {size(limit)}" if limit is not None else ""
    findings.add("cpu", "ok", f"{cgroups.processors()} of {os.cpu_count()} processors, memory: {memory}{limited}")
    library = {"onednn": "oneDNN", "torch": "torch's own library"}[
        library_for(torch.float32, torch.device("cpu"), "auto")
    ]
    units = bfloat16_units()
    scored = f"score computes bfloat16 checkpoints in {f'bfloat16 ({units})' if units else 'float32'}"
    findings.add("cpu arithmetic", "ok", f"float32 products by {library}; {scored}")
    try:
        names = [(f"cuda:{at}", torch.cuda.get_device_properties(at)) for at in range(torch.cuda.device_count())]
    except Exception as error:  # a driver can fail in many ways
        findings.add("cuda", "note", f"cannot be used: {first_line(error)}")
        names = []
    for name, device in names:
        ability = f"compute capability {device.major}.{device.minor}"
        findings.add(name, "ok", f"{device.name}, {size(device.total_memory)}, {ability}, CUDA {torch.version.cuda}")
    if not names and not any(finding.what == "cuda" for finding in findings):
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        findings.add("cuda", "note", f"none ({built})")
    if torch.backends.mps.is_available():
        findings.add("mps", "note", "the GPU of a Mac: `auto` uses it; shortstack was not tested on one")
    return findings


def _engines() -> Findings:
    findings = Findings()
    findings.add("transformers", "ok", "in this environment")
    for engine, programs in _ENGINES.items():
        places = [found for name in programs if (found := shutil.which(name))]
        if places:
            findings.add(engine, "ok", ", ".join(places))
        else:
            findings.add(
                engine, "note", f"no {' or '.join(programs)} on PATH: name its folder with bench --engine-binary"
            )
    return findings


def _caches() -> Findings:
    from huggingface_hub import constants

    findings = Findings()
    for name, folder in (("hub", Path(constants.HF_HUB_CACHE)), ("evaluations", cache_folder())):
        if not folder.is_dir():
            findings.add(name, "ok", f"{folder}: does not exist yet")
            continue
        files, nbytes, unread = _measured(folder)
        free = size(shutil.disk_usage(folder).free)
        findings.add(name, "ok", f"{folder}: {size(nbytes)} in {files} files ({free} free on its disk)")
        if unread:
            findings.add(name, "note", f"{unread} folders in it cannot be read and are not counted")
    return findings


def _measured(folder: Path) -> tuple[int, int, int]:
    """(files, bytes, folders that cannot be read) below a folder; links are not followed, so nothing counts twice."""
    files, nbytes = 0, 0
    unread: list[OSError] = []
    for place, _, names in os.walk(folder, onerror=unread.append):
        for name in names:
            try:
                found = os.lstat(os.path.join(place, name))
            except OSError:  # it is gone since
                continue
            files += 1
            nbytes += found.st_size
    return files, nbytes, len(unread)


def _environment() -> Findings:
    from huggingface_hub import constants, get_token

    findings = Findings()
    findings.add("hub", "ok", f"{constants.ENDPOINT}{', offline' if constants.HF_HUB_OFFLINE else ''}")
    if get_token() is None:
        findings.add("token", "note", "none: gated models and pushing need one (hf auth login)")
    else:
        findings.add("token", "ok", "there is one")
    for name in _VARIABLES:
        if name in os.environ:
            findings.add(name, "ok", plain(os.environ[name]))
    return findings
