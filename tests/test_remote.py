"""Addresses in object stores: fsspec's store in memory stands for one."""

import fsspec
import pytest

from kdjax import data, files, remote, resources
from kdjax.errors import UserError
from kdjax.training import config as settings
from tests.support.data import small_folder


@pytest.fixture
def store(monkeypatch, tmp_path):
    """An empty store at memory://, and an empty cache."""
    monkeypatch.setenv("KDJAX_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/bucket", recursive=True) if system.exists("/bucket") else None


def test_a_folder_is_downloaded_once_and_kept_up(store, monkeypatch):
    asked, get = [], type(store).get_file
    monkeypatch.setattr(type(store), "get_file", lambda self, path, *rest, **options: (
        asked.append(path), get(self, path, *rest, **options)))  # fmt: skip
    store.pipe({"/bucket/a/one.txt": b"1", "/bucket/a/deep/two.txt": b"22", "/bucket/other.txt": b"no"})
    copy = remote.local("memory://bucket/a/")
    assert copy == remote.local("memory://bucket/a") and copy.is_relative_to(files.cache_root())
    assert {p.relative_to(copy).as_posix(): p.read_bytes() for p in copy.rglob("*") if p.is_file()} == {
        "one.txt": b"1", "deep/two.txt": b"22"}  # fmt: skip
    assert len(asked) == 2
    store.pipe_file("/bucket/a/deep/two.txt", b"33")  # of the same size
    store.rm_file("/bucket/a/one.txt")
    assert remote.local("memory://bucket/a") == copy and len(asked) == 3
    assert not (copy / "one.txt").exists() and (copy / "deep" / "two.txt").read_bytes() == b"33"
    (copy / "deep" / "two.txt").unlink()
    assert (remote.local("memory://bucket/a") / "deep" / "two.txt").read_bytes() == b"33"


def test_an_address_may_be_that_of_a_file(store):
    store.pipe_file("/bucket/weights.onnx", b"abc")
    assert remote.local("memory://bucket/weights.onnx").read_bytes() == b"abc"
    assert resources.model_path("memory://bucket/weights.onnx").name == "weights.onnx"


def test_a_download_that_fails_leaves_no_part(store, monkeypatch):
    store.pipe({"/bucket/a/one.txt": b"1", "/bucket/a/two.txt": b"2"})

    def fail(self, path, local, **_):
        with open(local, "wb") as file:
            file.write(b"half")
        raise ConnectionError("the line is cut")

    with monkeypatch.context() as patched:
        patched.setattr(type(store), "get_file", fail)
        with pytest.raises(UserError, match=r"memory://bucket/a cannot be read \(ConnectionError: the line is cut\)"):
            remote.local("memory://bucket/a")
    copy = remote.local("memory://bucket/a")
    assert sorted(path.name for path in copy.iterdir()) == ["one.txt", "two.txt"]
    assert (copy / "one.txt").read_bytes() == b"1"


def test_data_at_an_address_are_those_of_a_folder(store, tmp_path):
    folder = small_folder(tmp_path / "small")
    store.put(f"{folder}/", "/bucket/small", recursive=True)
    cfg = settings.base().data
    cfg.update(dict(source="coco_folder", root=str(folder)))
    here = data.open_dataset(cfg)
    cfg.root = "memory://bucket/small"
    assert data.open_dataset(cfg).fingerprint == here.fingerprint
    cfg.root = "memory://bucket/smell"
    with pytest.raises(UserError, match=r"^root: memory://bucket/smell: there is nothing at this address"):
        data.open_dataset(cfg)


@pytest.mark.user_input("Folders and names", "an address at which nothing is", "refused: there is nothing at it")
def test_an_address_without_anything_is_refused(store):
    with pytest.raises(UserError, match="memory://bucket/none: there is nothing at this address"):
        remote.local("memory://bucket/none")


@pytest.mark.user_input(
    "Folders and names", "an address that needs a package, or of no kind", "refused: how to install it"
)
def test_an_address_that_nobody_reads_is_refused(store, monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    with pytest.raises(UserError, match=r"zz://a: fsspec knows no addresses that begin with zz://"):
        remote.local("zz://a")
    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(
        UserError, match=r"s3://a: the package that reads s3:// is not installed: pip install 'kdjax\[s3\]'"
    ):
        remote.local("s3://a")
