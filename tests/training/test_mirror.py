"""A workdir in an object store: what is there after a process ended or was killed, and what another one makes of it."""

import contextlib
import json
import shutil
import socket

import fsspec
import pytest

from kdjax import remote
from kdjax.errors import UserError
from kdjax.training import mirror
from kdjax.training.mirror import Mirror
from kdjax.training.run import run
from tests.faults.runs import differences, outcome
from tests.support.runs import random_teacher, stopped_in_step, tiny_config

URL = "memory://bucket/run"


@pytest.fixture
def store(monkeypatch, tmp_path):
    monkeypatch.setenv("KDJAX_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    yield system
    if system.exists("/bucket"):
        system.rm("/bucket", recursive=True)


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def elsewhere():
    """The next process runs on another machine."""
    shutil.rmtree(remote.copy_of(URL, "workdirs").parent)


def begun():
    one = Mirror(URL)
    one.folder.parent.mkdir(parents=True, exist_ok=True)
    one.pull()
    one.claim()
    return one


def test_an_object_whose_name_leads_out_of_the_folder_is_refused(store):
    store.pipe_file("/bucket/run/../../../evil.txt", b"x")
    with (
        pytest.raises(UserError, match=r"^workdir: memory://bucket/run: the name of an object leads out of the folder"),
        mirror.opened(URL),
    ):
        pass
    assert not [*remote.copy_of(URL, "workdirs").parents[2].rglob("evil.txt")]


def test_what_a_run_wrote_is_there_on_another_machine(store):
    files = {
        "config.json": "{}",
        "metrics.jsonl": "1\n",
        "checkpoints/10/state/d/a": "x",
        "checkpoints/10/note/.b": "y",
    }
    left_out = {".lock": "", "checkpoints/20.orbax-checkpoint-tmp/a": "z", ".abc.1.tmp": ""}
    left_out |= {"blackbox/.step-4.17.tmp/state.npz": "half"}
    with mirror.opened(URL) as (folder, one):
        assert folder.is_dir() and not content(folder)
        one.claim()
        write(folder, files | left_out)
    elsewhere()
    with mirror.opened(URL) as (folder, one):
        assert content(folder) == files
        one.claim()
        shutil.rmtree(folder / "checkpoints" / "10")
        write(folder, {"metrics.jsonl": "1\n2\n", "checkpoints/20/a": "z"})
    assert not store.find("/bucket/run/checkpoints/10")
    elsewhere()
    with mirror.opened(URL) as (folder, _):
        assert content(folder) == {"config.json": "{}", "metrics.jsonl": "1\n2\n", "checkpoints/20/a": "z"}


def test_a_checkpoint_that_was_uploaded_in_part_does_not_count(store, monkeypatch):
    one = begun()
    write(one.folder, {"checkpoints/10/a": "x"})
    one.start()
    one.running.result()
    put = type(store).put_file

    def cut(self, local, path, **options):
        if path.endswith("/20/b"):
            raise ConnectionError("the machine is gone")
        put(self, local, path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(type(store), "put_file", cut)
        write(one.folder, {"checkpoints/20/a": "y", "checkpoints/20/b": "z"})
        with pytest.raises(
            UserError, match=r"^workdir: memory://bucket/run cannot be written \(ConnectionError: the m"
        ):
            one._push()
    assert store.exists("/bucket/run/checkpoints/20/a")
    elsewhere()
    other = begun()
    assert content(other.folder) == {"checkpoints/10/a": "x"}


def test_the_machine_that_wrote_last_keeps_what_it_could_not_upload(store, monkeypatch, capsys):
    def cut(*_, **__):
        raise ConnectionError("no network")

    one = begun()
    write(one.folder, {"checkpoints/10/a": "x", "metrics.jsonl": "1"})
    with monkeypatch.context() as patched:
        patched.setattr(type(store), "put_file", cut)
        one.start()
        one.running.result()
        assert "no network): check the address, the network and your rights; it is tried" in capsys.readouterr().err
        with pytest.raises(UserError, match=r"the rest is in .*run: the same command on this machine uploads it$"):
            one.finish()
    with mirror.opened(URL) as (folder, other):
        assert content(folder) == {"checkpoints/10/a": "x", "metrics.jsonl": "1"}
        other.claim()
    assert store.cat_file("/bucket/run/checkpoints/10/a") == b"x"
    assert json.loads(store.cat_file("/bucket/run/uploaded.json")) == {"steps": {"10": {"checkpoints/10/a": 1}}}


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "an address at which another process has begun to write", "refused: this one ends"
)
def test_a_process_ends_when_another_one_writes(store):
    one = begun()
    begun()
    write(one.folder, {"checkpoints/10/a": "x"})
    one.start()
    with pytest.raises(UserError, match="another process has begun to write there: this one ends"):
        one.running.result()
    with pytest.raises(UserError, match="another process has begun to write there"):
        one.finish()
    assert not store.find("/bucket/run/checkpoints")


def test_a_failed_run_does_not_hide_its_reason(store, capsys):
    def fails():
        with mirror.opened(URL) as (_, one):
            one.claim()
            begun()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fails()
    assert "another process has begun to write there" in capsys.readouterr().err


def test_a_folder_of_this_machine_has_no_mirror(tmp_path):
    with mirror.opened(tmp_path) as (folder, one):
        assert folder == tmp_path and one is None


@contextlib.contextmanager
def server_of(protocol, monkeypatch):
    """A server of this machine in the place of S3 or Google's store, with a bucket "bucket"."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    if protocol == "s3":
        server = pytest.importorskip("moto.server", reason="needs moto[server] and s3fs").ThreadedMotoServer(port=port)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "none")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://localhost:{port}")
    else:
        emulator = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator and gcsfs")
        server = emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # the emulator has no gRPC
        monkeypatch.setenv("NO_GCE_CHECK", "true")
    pytest.importorskip({"s3": "s3fs", "gs": "gcsfs"}[protocol])
    server.start()
    try:
        system = fsspec.filesystem(protocol)
        if protocol == "s3":
            system.mkdir("bucket")
        yield system
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the servers and their packages
@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_a_run_in_a_store_goes_on_elsewhere_to_the_same_bits(protocol, monkeypatch, tmp_path, folder):
    """It is stopped, and goes on without the files of the first process."""
    monkeypatch.setenv("KDJAX_CACHE", str(tmp_path / "cache"))
    url = f"{protocol}://bucket/runs/a"
    teacher = random_teacher(tmp_path / "small")
    config = tiny_config(folder, teacher=teacher, method="cwd", batch_size=4)
    with server_of(protocol, monkeypatch) as system:
        run(config, tmp_path / "undisturbed")
        system.put(f"{teacher}/", "bucket/teacher", recursive=True)
        config.teacher.weights = f"{protocol}://bucket/teacher"
        with stopped_in_step(12):
            run(config, url)
        shutil.rmtree(remote.copy_of(url, "workdirs").parent)
        run(config, url)
        system.get("bucket/runs/a", str(tmp_path / "found"), recursive=True)
    assert not differences(outcome(tmp_path / "found"), outcome(tmp_path / "undisturbed"))
