"""Limits of containers: version 1 and 2, nested, with page cache that can be taken back; memory and processors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shortstack.runtime import cgroups, memory

GB = 1 << 30


class Machine:
    """A /proc/self and the groups that it speaks of."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.mount = folder / "proc", folder / "cgroup"
        self.proc.mkdir()
        self.mount.mkdir()

    def in_group(self, line: str, *, kind: str, options: str = "rw", root: str = "/") -> None:
        (self.proc / "cgroup").write_text(line + "\n")
        (self.proc / "mountinfo").write_text(
            "22 1 0:20 / /proc rw - proc proc rw\n"
            f"33 24 0:28 {root} {self.mount} rw,nosuid shared:9 - {kind} cgroup {options}\n"
        )

    def group(self, path: str, **files: object) -> None:
        folder = self.mount / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / name.replace("__", ".")).write_text(f"{value}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setattr(cgroups, "_PROC", made.proc)
    monkeypatch.setattr(memory, "_free_on_machine", lambda: 64 * GB)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    return made


@pytest.mark.fault(108)
def test_version_2_where_the_smallest_limit_of_all_levels_holds(machine: Machine) -> None:
    machine.in_group("0::/job/step", kind="cgroup2")
    machine.group("job/step", memory__max="max", memory__high="max", memory__current=GB, cpu__max="max 100000")
    machine.group(
        "job", memory__max=8 * GB, memory__high=6 * GB, memory__current=3 * GB, cpu__max="250000 100000",
        memory__stat=f"anon {GB}\ninactive_file {GB}",
    )  # fmt: skip
    assert memory.available_bytes() == 4 * GB  # 6 GB, of which 3 are used, one of them for page cache
    assert memory.installed_bytes() == min(6 * GB, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    assert cgroups.processors() == 3


@pytest.mark.fault(108)
def test_version_1_inside_a_container_that_sees_the_hosts_path(machine: Machine) -> None:
    machine.in_group("9:cpu,cpuacct,memory:/docker/abc", kind="cgroup", options="rw,cpu,memory", root="/docker/abc")
    machine.group(
        ".", memory__limit_in_bytes=2 * GB, memory__usage_in_bytes=GB // 2, memory__stat="total_inactive_file 0",
        cpu__cfs_quota_us=400000, cpu__cfs_period_us=100000,
    )  # fmt: skip
    assert memory.available_bytes() == 2 * GB - GB // 2
    assert cgroups.processors() == 4


def test_a_path_that_cannot_be_seen_is_the_mount_itself(machine: Machine) -> None:
    machine.in_group("0::/../../user.slice", kind="cgroup2")
    machine.group(".", memory__max=GB, memory__current=2 * GB)
    assert memory.available_bytes() == 0


@pytest.mark.parametrize("limit", ["max", str((1 << 63) - 4096)])
def test_no_limit(machine: Machine, limit: str) -> None:
    if limit == "max":
        machine.in_group("0::/", kind="cgroup2")
        machine.group(".", memory__max=limit, cpu__max="max 100000")
    else:
        machine.in_group("4:memory:/", kind="cgroup", options="rw,memory")
        machine.group(".", memory__limit_in_bytes=limit, memory__usage_in_bytes=GB)
    assert cgroups.memory_limit() is None
    assert memory.available_bytes() == 64 * GB
    assert cgroups.processors() == 16


def test_affinity_and_systems_without_groups(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4})
    assert cgroups.processors() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert cgroups.processors() == 5
    assert memory.available_bytes() == 64 * GB


@pytest.mark.fault(108)
@pytest.mark.parametrize(("given", "expected"), [(None, "3"), ("5", "5")])
def test_the_command_line_says_the_quota_to_torch(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    from shortstack.cli.app import run

    machine.in_group("0::/", kind="cgroup2")
    machine.group(".", cpu__max="300000 100000")
    monkeypatch.setenv("OMP_NUM_THREADS", given or "")
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    assert run(["families"]) == 0
    assert os.environ["OMP_NUM_THREADS"] == expected
