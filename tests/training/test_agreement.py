"""What hosts compare before they compute anything."""

import json
import threading

import pytest

from kdjax import data
from kdjax.training import agreement, cluster
from kdjax.training.cluster import Different, Watch
from tests.support.runs import tiny_config
from tests.training.test_cluster import Store


class Waiting(Store):
    """A store of several threads."""

    def __init__(self):
        super().__init__()
        self.changed = threading.Condition()

    def set(self, key, value):
        with self.changed:
            self[key] = value
            self.changed.notify_all()

    def get(self, key, seconds):
        with self.changed:
            self.changed.wait_for(lambda: key in self, seconds)
            return dict.get(self, key)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("cache"), teacher=None)
    return config, data.open_dataset(config.data)


def said(monkeypatch, prepared, folders, changes):
    """What the hosts say, each a thread of its own."""
    config, dataset = prepared
    store, told, here = Waiting(), {}, threading.local()
    monkeypatch.setattr(cluster, "current", lambda: here.watch)
    monkeypatch.setattr(agreement, "_SHARED", 0.2)

    def host(number):
        here.watch = Watch(store, number, len(folders), name=f"node{number}")
        own = config.copy_and_resolve_references()
        own.update(changes[number])
        try:
            told[number] = agreement.check(own, dataset, folders[number])
        except Different as error:
            told[number] = str(error)

    threads = [threading.Thread(target=host, args=[number]) for number in range(len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(told) == set(range(len(folders)))
    assert len(set(told.values())) == 1  # the same on all hosts
    return told[0]


@pytest.mark.user_input(
    "Config and flags", "hosts with other settings, data, code or versions", "refused on each, by name"
)
def test_settings_that_differ_are_named_with_their_hosts(monkeypatch, prepared, tmp_path):
    changes = [{}, {"optimizer": {"lr": 0.01}}, {"log_every": 7, "data": {"workers": 3, "cache": "elsewhere"}}]
    assert said(monkeypatch, prepared, [tmp_path] * 3, changes) == (
        "config.log_every is 5 on host 0 (node0), host 1 (node1) and 7 on host 2 (node2); "
        "config.optimizer.lr is 0.002 on host 0 (node0), host 2 (node2) and 0.01 on host 1 (node1): "
        "all hosts must run the same"
    )
    assert not [*tmp_path.iterdir()]


def test_equal_hosts_agree(monkeypatch, prepared, tmp_path):
    assert said(monkeypatch, prepared, [tmp_path] * 2, [{}, {"data": {"root": "there", "keep": 0.0}}]) is None


@pytest.mark.user_input("Config and flags", "hosts whose workdir is not on a shared file system", "refused on each")
def test_a_workdir_that_is_not_shared(monkeypatch, prepared, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    assert said(monkeypatch, prepared, folders, [{}, {}]) == (
        f"workdir: {folders[1]} of host 1 (node1) is not the folder {folders[0]} of host 0 (node0): "
        "choose one on a file system that all hosts share"
    )


def test_facts_follow_content(prepared, tmp_path):
    config, dataset = prepared
    before = agreement.facts(config, dataset, tmp_path)
    json.dumps(before)
    assert before["the last checkpoint"] == "none"
    (tmp_path / "checkpoints" / "20" / "note").mkdir(parents=True)
    (tmp_path / "checkpoints" / "20" / "note" / "metadata").write_text("{}")
    (tmp_path / "checkpoints" / "10").mkdir()
    (tmp_path / "checkpoints" / "30.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "a.safetensors").write_bytes(b"1")
    changed = config.copy_and_resolve_references()
    changed.teacher.weights = str(tmp_path / "a.safetensors")
    after = agreement.facts(changed, dataset, tmp_path)
    assert after["the last checkpoint"].startswith("of step 20, ")
    name = "the content of config.teacher.weights"
    (tmp_path / "a.safetensors").write_bytes(b"2")
    assert name not in before and after[name] != agreement.facts(changed, dataset, tmp_path)[name] != ""
    (tmp_path / "checkpoints" / "20" / "note" / "metadata").write_text("{ }")
    assert after["the last checkpoint"] != agreement.checkpoint(tmp_path)


def test_many_differences_are_counted(monkeypatch, prepared, tmp_path):
    changes = [{}, dict(seed=1, steps=30, log_every=1, batch_size=16)]
    told = said(monkeypatch, prepared, [tmp_path] * 2, changes)
    assert told.count(" is ") == 3 and told.endswith("; and 1 more: all hosts must run the same")
