"""Several hosts: what a host concludes from the others' heartbeats, and how it leaves."""

import json
import threading
import time

import jax
import pytest

from kdjax.errors import UserError
from kdjax.training import cluster
from kdjax.training.cluster import BEGINS, COMPUTES, DONE, READS, RESTART, Different, Watch


class Store(dict):
    """A store of this process; `gone` is a coordinator that does not answer."""

    gone = False

    def set(self, key, value):
        if self.gone:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect")
        self[key] = value

    def get(self, key, seconds):
        return dict.get(self, key)

    def below(self, prefix):
        if self.gone:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect")
        return {key.removeprefix(prefix): value for key, value in self.items() if key.startswith(prefix)}


class Hosts:
    """Hosts of one run without threads: `run` lets the time pass and those live that are asked for."""

    def __init__(self, count):
        self.now, self.store, self.codes = 0.0, Store(), {}
        self.all = [
            Watch(
                self.store,
                host,
                count,
                name="abcd"[host],
                clock=lambda: self.now,
                end=lambda code, host=host: self.codes.setdefault(host, code),
            )
            for host in range(count)
        ]

    def run(self, seconds, alive=None, do=lambda watch: None):
        for _ in range(int(seconds)):
            self.now += 1
            for watch in self.all if alive is None else [self.all[host] for host in alive]:
                do(watch)
                try:
                    watch.pulse()
                except jax.errors.JaxRuntimeError:
                    pass

    def step(self, watch):
        watch.at(READS, watch.heartbeat.step + 1)
        watch.at(COMPUTES)


@pytest.fixture
def three():
    hosts = Hosts(3)
    hosts.run(5, do=hosts.step)
    assert [watch.verdict() for watch in hosts.all] == [None] * 3
    return hosts


def test_a_host_without_signs_of_life_is_named_within_the_timeout(three):
    three.run(59, alive=[0, 2])
    assert three.all[0].verdict() is None
    three.run(3, alive=[0, 2])
    said = "host 1 (b, which was at step 5) has not been heard of for 60 s"
    assert three.all[0].verdict() == three.all[2].verdict() == (said, RESTART)


def test_several_lost_hosts_and_one_that_never_came_are_named():
    hosts = Hosts(3)
    hosts.run(1, alive=[0, 1])
    hosts.run(70, alive=[0])
    said, code = hosts.all[0].verdict()
    assert said == (
        "hosts 1 (b, which was at step 0) and 2 (which never said its name) have not been heard of for 60 s"
    )
    assert code == RESTART


def test_a_coordinator_that_does_not_answer_is_named_by_the_others(three):
    three.store.gone = True
    three.run(61)
    said = "host 0, which coordinates the others, has not answered for 61 s"
    assert three.all[1].verdict() == three.all[2].verdict() == (said, RESTART)


def test_a_host_that_hangs_in_its_data_is_named_though_it_lives(three):
    for watch in three.all:
        watch.at(READS, 6)
        if watch.host != 1:
            watch.at(COMPUTES)
    three.run(90)
    assert three.all[0].verdict() is None
    three.run(3)
    for watch in three.all:
        said, code = watch.verdict()
        assert code == RESTART and said.startswith("no host has made progress for 9")
        assert said.endswith(" s: host 1 (b) still reads the batch of step 6")


def test_a_collective_that_hangs_on_all_hosts_is_told(three):
    three.run(95)
    said, code = three.all[2].verdict()
    assert code == RESTART
    assert said.startswith("no host has made progress for 9") and said.endswith(" s: each computes step 5")


def test_slow_steps_and_the_first_ones_do_not_count_as_hanging():
    hosts = Hosts(2)
    for watch in hosts.all:
        watch.at(READS, 1)
        assert watch.heartbeat.doing == BEGINS  # it loads and tunes programs
    hosts.run(3000)
    assert hosts.all[0].verdict() is None
    for _ in range(3):  # steps of 80 s
        for watch in hosts.all:
            hosts.step(watch)
        hosts.run(80)
        assert hosts.all[0].verdict() is None
    hosts.run(320)
    assert hosts.all[0].verdict() is None
    hosts.run(90)
    assert "no host has made progress" in hosts.all[0].verdict()[0]


def test_an_evaluation_may_take_longer_but_not_forever(three):
    for watch in three.all:
        watch.at("evaluates after")
    three.run(3600)
    assert three.all[0].verdict() is None
    three.run(3)
    assert three.all[0].verdict()[0] == "no host has made progress for 3601 s: each evaluates after step 5"


@pytest.mark.parametrize("asked", [[1], [0, 2]])
def test_hosts_agree_on_the_last_step_without_waiting_for_each_other_in_it(asked):
    """No host is more than a step ahead, as with collectives; none may be asked for a step that it has passed."""
    store, stopped, ahead = Store(), {}, threading.Barrier(3)
    watches = [Watch(store, host, 3, name="abc"[host]) for host in range(3)]

    def loop(watch):
        with watch:
            for step in range(1, 1000):
                ahead.wait(30)
                time.sleep(0.002 * watch.host)
                if watch.is_last(watch.host in asked and step >= 5, step):
                    stopped[watch.host] = step
                    break

    threads = [threading.Thread(target=loop, args=[watch], daemon=True) for watch in watches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(stopped) == 3 and len(set(stopped.values())) == 1 and 6 <= stopped[0] < 900


def test_a_host_that_is_done_may_end(three):
    three.all[1].at(DONE)
    three.run(1)
    three.run(100, alive=[0, 2], do=three.step)
    assert three.all[0].verdict() is three.all[2].verdict() is None


def test_a_process_that_stood_still_does_not_blame_the_others(three):
    three.now += 500  # SIGSTOP, SIGCONT
    watch = three.all[2]
    assert watch.verdict()
    watch.forgive(500)
    assert watch.verdict() is None


def test_the_others_leave_with_the_code_of_a_host_that_ends_and_say_why(three, capfd):
    with pytest.raises(UserError), three.all[1]:
        raise UserError("workdir: the disk is full")
    for host in (0, 2):
        three.all[host].pulse()
        three.all[host].leave(*three.all[host].verdict())
    assert three.codes == {0: 2, 2: 2}
    assert capfd.readouterr().err.count("kdjax: host 1 (b) ended: workdir: the disk is full: this host leaves") == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (SystemExit(143), 143), (FloatingPointError("nan"), 2), (KeyError("a bug"), 1)],
)
def test_the_code_of_each_kind_of_end(three, error, code):
    with pytest.raises(type(error)), three.all[2]:
        raise error
    assert json.loads(three.store["live/left/2"])[1] == code == cluster.code_of(error)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"), 0),
        (ValueError("UNKNOWN: Gloo AllGather failed: Read error: Connection reset by peer"), 2),
    ],
    ids=["jax", "value"],
)
def test_an_error_that_a_lost_host_causes_does_not_hide_it(three, monkeypatch, capfd, error, lost):
    monkeypatch.setattr(cluster, "LOOK", 0.001)
    monkeypatch.setattr(cluster, "PULSE", 0.2)
    watch, three.store.gone = three.all[1], lost == 0
    clock = time.monotonic()
    watch.clock = lambda: three.now + time.monotonic() - clock

    def pulses():
        while not (watch.ended.wait(0.005) or three.store.gone):
            three.all[2 - lost].pulse()

    threading.Thread(target=pulses, daemon=True).start()
    with pytest.raises(type(error)), watch:
        raise error
    assert three.codes[1] == RESTART and f"host {lost}" in capfd.readouterr().err


def test_a_host_that_a_scheduler_stops_says_so(three):
    with pytest.raises(SystemExit), three.all[1]:
        raise SystemExit(143)
    assert json.loads(three.store["live/left/1"]) == ["host 1 (b) ended: it was stopped by SIGTERM", 143]


def test_hosts_agree_on_the_last_step_though_the_store_fails_once(monkeypatch):
    store, failures = Store(), [True] * 3
    whole = store.get

    def get(key, seconds):
        if key.startswith("passed/") and failures:
            failures.pop()
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect")
        return whole(key, seconds)

    monkeypatch.setattr(store, "get", get)
    watches = [Watch(store, host, 2, name="ab"[host]) for host in range(2)]
    watches[0].is_last(True, 5)
    for watch in watches * 2:
        watch.pulse()
    assert [watch.is_last(False, 6) for watch in watches] == [True, True] and not failures


def test_all_hosts_say_the_same_where_they_differ(three):
    with pytest.raises(Different), three.all[0]:
        raise Different("config.steps is 1 on host 0 (a) and 2 on host 1 (b)")
    three.all[1].pulse()
    assert three.all[1].verdict() == ("config.steps is 1 on host 0 (a) and 2 on host 1 (b)", 2)


@pytest.fixture(autouse=True)
def ends(monkeypatch):
    """Ends of this process that a test has asked for are not carried out when the tests end."""
    monkeypatch.setattr(cluster.atexit, "register", lambda *_: None)
    monkeypatch.setattr(cluster, "PULSE", 0.01)


def test_a_single_host_has_no_watch():
    with cluster.watching():
        assert cluster.current() is None
        cluster.at(READS, 1)
