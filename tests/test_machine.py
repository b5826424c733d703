"""Memory of the machine, of a container and of a job."""

import math

import pytest

from kdjax import machine

KIB = 1024


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder in which a machine of 9,000 KiB, 8,000 of them free, can be described."""
    monkeypatch.setattr(machine, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "FILES", tmp_path / "files")
    machine.MEMORY.write_text("MemTotal:  9000 kB\nMemFree:  1000 kB\nMemAvailable:  8000 kB\nHugePages_Total:  0\n")
    return tmp_path / "files"


def limited(folder, names, limit, used, inactive):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {inactive}\n")


def test_a_machine_without_limits(here):
    assert (machine.memory(), machine.free_memory()) == (9000 * KIB, 8000 * KIB)
    machine.GROUPS.write_text("0::/\n")
    here.mkdir()
    assert (machine.memory(), machine.free_memory()) == (9000 * KIB, 8000 * KIB)


@pytest.mark.parametrize("version", [1, 2])
def test_the_smallest_limit_counts_without_what_is_used(here, version):
    """That of a job inside a container; files that were read are taken back when memory is needed."""
    names = machine._NAMES[version]
    root = here / "memory" if version == 1 else here
    machine.GROUPS.write_text({1: "5:cpuset:/\n4:cpu,memory:/user/job\n", 2: "0::/user/job\n"}[version])
    limited(root, names, 7000 * KIB, 3000 * KIB, 500 * KIB)
    assert (machine.memory(), machine.free_memory()) == (7000 * KIB, 4500 * KIB)
    limited(root / "user" / "job", names, 5000 * KIB, 1000 * KIB, 0)
    assert (machine.memory(), machine.free_memory()) == (5000 * KIB, 4000 * KIB)
    limited(root / "user" / "job", names, {1: 2**63 - 4096, 2: "max"}[version], 1000 * KIB, 0)
    assert (machine.memory(), machine.free_memory()) == (7000 * KIB, 4500 * KIB)


def test_this_machine_has_memory():
    assert 2**28 < machine.free_memory() <= machine.memory() < math.inf
