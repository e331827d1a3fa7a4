import os
from pathlib import Path

import pytest

from serving.cores import usable_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def cores(tmp_path: Path, own: str, **files: str) -> int:
    """Return what a machine of 8 cores grants where `own` says the groups and `files` (a__b is a/b) their limits."""
    own_file = tmp_path / "own"
    own_file.write_text(own)
    for name, content in files.items():
        file = tmp_path / "cgroup" / name.replace("__", "/").replace("cpu_", "cpu.")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return usable_cores(tmp_path / "cgroup", own_file)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("1000 100000\n", 1),
        ("6400000 100000\n", 8),
        ("50000 25000\n", 2),
        ("300000\n", 3),
        ("0 100000\n", 8),
        ("100000 0\n", 8),
        ("nonsense\n", 8),
        ("", 8),
    ],
)
def test_the_quota_of_version_2_is_rounded_up_and_never_exceeds_the_affinity(
    tmp_path: Path, limit: str, expected: int
) -> None:
    assert cores(tmp_path, "0::/\n", cpu_max=limit) == expected


def test_the_tightest_group_on_the_way_up_counts(tmp_path: Path) -> None:
    own = "0::/a/b\n"
    assert cores(tmp_path, own, a__b__cpu_max="400000 100000", a__cpu_max="300000 100000", cpu_max="max 100000") == 3
    assert cores(tmp_path, own, a__b__cpu_max="100000 100000") == 1


def test_the_quota_of_version_1_is_read_under_either_name_of_its_mount(tmp_path: Path) -> None:
    limits = {"cpu_cfs_quota_us": "250000\n", "cpu_cfs_period_us": "100000\n"}
    for mount in ("cpu", "cpu,cpuacct"):
        folder = tmp_path / mount.replace(",", "+")
        files = {f"{mount}__{name}": text for name, text in limits.items()}
        folder.mkdir()
        assert cores(folder, "12:pids:/\n4:cpu,cpuacct:/docker/beef\n0::/\n", **files) == 3


def test_no_limit_of_version_1_is_no_limit(tmp_path: Path) -> None:
    assert cores(tmp_path, "1:cpu:/\n", cpu__cpu_cfs_quota_us="-1\n", cpu__cpu_cfs_period_us="100000\n") == 8


def test_a_path_that_leads_out_of_the_mount_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000")
    assert cores(tmp_path, "0::/..\n", cpu_max="500000 100000") == 5


def test_without_control_groups_the_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores(tmp_path, tmp_path / "nothing") == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(tmp_path, tmp_path / "nothing") == 1
