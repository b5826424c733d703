"""Several hosts of one run: how a lost one is noticed, and how the others leave.

Each process writes a heartbeat to the key-value store of jax's coordinator, and reads those of the others, in a
thread. Another thread judges them. If a host is lost, each remaining one says which and ends its process with
`RESTART`: what waits inside a collective cannot be woken otherwise.
"""

import atexit
import contextlib
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple, NoReturn, Protocol

import jax

from kdjax.errors import UserError, fault

RESTART = 75  # exit code of a host that leaves because another one is lost; EX_TEMPFAIL of sysexits.h
TIMEOUT = 60.0  # s without a heartbeat, after which a host counts as lost
HUNG = 1.5  # multiple of it, for which no host may make progress in a step
LONGEST = 5  # and multiple of the longest time that a part of a step has taken
PATIENCE = 60  # multiple of it for everything else: data, compilation, evaluation, saving
PULSE = 2.0  # s between two heartbeats
LOOK = 0.5  # s between two judgements
READS, COMPUTES, BEGINS, DONE = "reads the batch of", "computes", "begins with", "is done with"


class Different(UserError):
    """The hosts do not run the same; each raises it with the same message."""


class Store(Protocol):
    """What all hosts can read and write."""

    def set(self, key: str, value: str) -> None:
        """Writes a value, also over an earlier one."""

    def get(self, key: str, seconds: float) -> str | None:
        """A value, waiting for it at most so long; None if it is not there."""

    def below(self, prefix: str) -> dict[str, str]:
        """All values whose keys begin with `prefix`, by the rest of the key."""
        ...


class Coordinator:
    """The store of jax's coordinator, which runs in the process of host 0."""

    def __init__(self, client: Any) -> None:  # noqa: ANN401 - of a module of jaxlib without types
        self.client = client

    def set(self, key: str, value: str) -> None:  # noqa: D102 - as `Store`
        self.client.key_value_set(key, value, allow_overwrite=True)

    def get(self, key: str, seconds: float) -> str | None:  # noqa: D102
        try:
            return self.client.blocking_key_value_get(key, int(seconds * 1000))
        except Exception as error:  # jax.errors.JaxRuntimeError, of which only the text says why
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    def below(self, prefix: str) -> dict[str, str]:  # noqa: D102
        return {key.removeprefix(prefix): value for key, value in self.client.key_value_dir_get(prefix)}


class Heartbeat(NamedTuple):
    """A heartbeat, as it travels."""

    count: int  # grows with each
    moves: int  # grows with the host's progress
    doing: str
    step: int
    name: str  # of the machine


class Seen(NamedTuple):
    """The last heartbeat of a host, and when this host saw it change (s of the clock)."""

    heartbeat: Heartbeat
    heard: float
    moved: float


class Watch:
    """What this host knows of the others; a context in which a lost host ends the process.

    An exception that leaves the context is reported to the others, which then leave with the code that it has here.
    """

    def __init__(
        self,
        store: Store,
        host: int,
        hosts: int,
        *,
        timeout: float = TIMEOUT,
        together: type[BaseException] | tuple[type[BaseException], ...] = (),
        name: str = "",
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """Knows of nobody yet.

        Args:
          store: of the run.
          host, hosts: number of this host, from 0, and how many there are.
          timeout: s without a heartbeat, after which a host counts as lost.
          together: exceptions that all hosts raise at the same point.
          name: of this machine; "": as it calls itself.
          clock: seconds.
          end: ends the process with a code.
        """
        self.store, self.host, self.hosts = store, host, hosts
        self.timeout, self.together, self.clock, self.end = timeout, together, clock, end
        self.name = name or socket.gethostname()
        self.heartbeat = Heartbeat(0, 0, "starts", 0, self.name)
        self.count, self.longest, self.steps = 0, 0.0, 0  # heartbeats; of a part of a step, s; steps so far
        now = clock()
        self.began = self.contact = self.moved = now
        self.seen: dict[int, Seen] = {}
        self.left: dict[int, tuple[str, int]] = {}  # why hosts have left and their codes, in the order of hearing it
        self.ended, self.beat = threading.Event(), threading.Event()
        self.stops, self.asked = threading.Condition(), False  # whether this host was asked to stop
        self.agreeing, self.passed, self.last = False, 0, math.inf  # steps: passed by this host, last of all
        self.threads: list[threading.Thread] = []

    # What the run tells

    def at(self, doing: str, step: int | None = None) -> None:
        """Says what this host does now; each call shows progress.

        Args:
          doing: "reads the batch of", "computes", ...; the step follows.
          step: number of the update; None: as before.
        """
        now, before = self.clock(), self.heartbeat
        if before.doing in (READS, COMPUTES):
            self.longest = max(self.longest, now - self.moved)
        step = before.step if step is None else step
        self.steps += step != before.step
        if doing in (READS, COMPUTES) and self.steps < 3:  # they also load, tune and compile
            doing = BEGINS
        self.heartbeat = before._replace(moves=before.moves + 1, doing=doing, step=step)
        self.moved = now

    def is_last(self, stop: bool, step: int) -> bool:
        """Whether all hosts stop at this step; each calls it once in every step, and none waits for a collective.

        Once a host was asked to stop, each says which step it has passed, and stays in the next until all have: they
        stop at the first that none has passed.

        Args:
          stop: whether this host was asked to stop.
          step: number of the update, one more than in the call before.
        """
        with self.stops:
            if stop and not self.asked:
                self.asked = True
                self.beat.set()
            self.stops.wait_for(lambda: not self.agreeing)
            if step >= self.last:
                return True
            self.passed = step
            return False

    def _agree(self) -> None:
        """In a thread of its own: the hosts agree on the last step."""
        with self.stops:
            mine = str(self.passed)
        self.until_it_works(lambda: self.store.set(f"passed/{self.host}", mine))
        passed = [int(self.wait_for(f"passed/{host}")) for host in range(self.hosts)]
        with self.stops:
            self.last, self.agreeing = max(passed) + 1, False
            self.stops.notify_all()

    def until_it_works(self, call: Callable[[], Any]) -> Any:  # noqa: ANN401 - what the call returns
        """The result of a call to the store, which is made again while it fails: `verdict` sees how long."""
        while True:
            with contextlib.suppress(Exception):
                return call()
            self.ended.wait(PULSE)

    def wait_for(self, key: str) -> str:
        """A value that another host writes; this waits as long as it lives."""
        while (value := self.until_it_works(lambda: self.store.get(key, 5.0))) is None:
            pass
        return value

    # What the threads do

    def pulse(self) -> None:
        """Tells that this host lives, and reads what the others tell."""
        self.count += 1
        heartbeat = self.heartbeat._replace(count=self.count)
        if self.asked:
            self.store.set("live/stop/0", json.dumps(True))
        self.store.set(f"live/heartbeat/{self.host}", json.dumps(heartbeat))
        found, now = self.store.below("live/"), self.clock()
        stop = found.pop("stop/0", None)
        for key, value in found.items():
            kind, _, host = key.partition("/")
            if kind == "left":
                why, code = json.loads(value)
                self.left.setdefault(int(host), (why, code))
                continue
            new, old = Heartbeat(*json.loads(value)), self.seen.get(int(host))
            if old is None or new.count != old.heartbeat.count:
                moved = now if old is None or new.moves != old.heartbeat.moves else old.moved
                self.seen[int(host)] = Seen(new, now, moved)
        self.contact = now
        if stop and self.last == math.inf and not self.agreeing:
            self.agreeing = True
            threading.Thread(target=self._agree, daemon=True).start()

    def verdict(self) -> tuple[str, int] | None:
        """Why this host must leave and with which code; None as long as all is well."""
        now = self.clock()
        for host, told in list(self.left.items()):
            if host != self.host:
                return told
        if now - self.contact > self.timeout:
            return f"host 0, which coordinates the others, has not answered for {now - self.contact:.0f} s", RESTART
        everyone, lost = dict(self.seen), []  # a copy: the other thread adds to it
        for host in set(range(self.hosts)) - {self.host}:
            seen = everyone.get(host)
            if seen is None:
                if now - self.began > self.timeout:
                    lost.append(f"{host} (which never said its name)")
            elif seen.heartbeat.doing != DONE and now - seen.heard > self.timeout:
                lost.append(f"{host} ({seen.heartbeat.name}, which was at step {seen.heartbeat.step})")
        if lost:
            who = f"host{'s' * (len(lost) > 1)} {' and '.join(lost)}"
            return f"{who} {'have' if len(lost) > 1 else 'has'} not been heard of for {self.timeout:.0f} s", RESTART
        return self._hung(everyone, now)

    def _hung(self, everyone: Mapping[int, Seen], now: float) -> tuple[str, int] | None:
        """No host makes progress: those that do not wait for the others are the reason."""
        if len(everyone) < self.hosts:
            return None
        heartbeats = {host: seen.heartbeat for host, seen in everyone.items()} | {self.host: self.heartbeat}
        moved = {host: seen.moved for host, seen in everyone.items()} | {self.host: self.moved}
        stepping = all(heartbeat.doing in (READS, COMPUTES) for heartbeat in heartbeats.values())
        bound = max(HUNG * self.timeout, LONGEST * self.longest) if stepping else PATIENCE * self.timeout
        for_long = now - max(moved.values())
        if for_long <= bound:
            return None
        busy = [host for host, one in heartbeats.items() if one.doing not in (COMPUTES, DONE)] or list(heartbeats)
        first = min(heartbeats[host].step for host in busy)
        behind = [(host, heartbeats[host]) for host in sorted(busy) if heartbeats[host].step == first]
        if len(behind) == self.hosts:
            doing = behind[0][1].doing
            return f"no host has made progress for {for_long:.0f} s: each {doing} step {first}", RESTART
        told = [f"host {host} ({one.name}) still {one.doing} step {first}" for host, one in behind]
        return f"no host has made progress for {for_long:.0f} s: {'; '.join(told)}", RESTART

    def _pulses(self) -> None:
        while not self.ended.is_set():
            with contextlib.suppress(Exception):  # the coordinator does not answer: `verdict` sees how long
                self.pulse()
            self.beat.wait(PULSE)
            self.beat.clear()

    def _judges(self) -> None:
        before = self.clock()
        while not self.ended.wait(LOOK):
            now = self.clock()
            if now - before > 5 * PULSE:  # this process was stopped: the others are judged by what comes now
                self.forgive(now - before)
            before = now
            if found := self.verdict():
                return self.leave(*found)

    def forgive(self, seconds: float) -> None:
        """Leaves a time in which this process itself stood still out of all waiting times."""
        self.began, self.contact, self.moved = self.began + seconds, self.contact + seconds, self.moved + seconds
        self.seen = {
            host: one._replace(heard=one.heard + seconds, moved=one.moved + seconds) for host, one in self.seen.items()
        }

    # How a host leaves

    def leave(self, why: str, code: int) -> None:
        """Says why, tells the others, and ends the process."""
        more = "the same command on all hosts continues from the last checkpoint" if code == RESTART else ""
        told = f"\nkdjax: {why}: this host leaves with code {code}{'; ' * bool(more)}{more}\n"
        os.write(2, told.encode(errors="backslashreplace"))
        self._tell(why, code)
        _flush()
        self.end(code)

    def _tell(self, why: str, code: int) -> None:
        """Tells the others why this host leaves; host 0 stays until they know, because their store ends with it."""

        def tell() -> None:
            with contextlib.suppress(Exception):
                self.store.set(f"live/left/{self.host}", json.dumps([why, code]))
                until = self.clock() + 3 * PULSE
                while self.host == 0 and self.clock() < until:
                    recent = {host for host, one in self.seen.items() if self.clock() - one.heard < 3 * PULSE}
                    told = {int(key) for key in self.store.below("live/left/")}
                    if recent <= told | {0}:
                        return
                    time.sleep(0.1)

        teller = threading.Thread(target=tell, daemon=True)  # the coordinator may not answer any more
        teller.start()
        teller.join(4 * PULSE)

    def __enter__(self) -> "Watch":
        for target in (self._pulses, self._judges):
            thread = threading.Thread(target=target, daemon=True, name=f"kdjax hosts {target.__name__}")
            thread.start()
            self.threads.append(thread)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, self.together):
            self.at(DONE)
            while not all(host in self.seen and self.seen[host].heartbeat.doing == DONE for host in range(self.hosts)):
                self.beat.set()
                time.sleep(0.1)
            self.ended.set()
            return
        if isinstance(error, Exception) and code_of(error) == 1:
            # Collectives fail where a host is lost, as an exception of jax, a ValueError, or whatever Orbax makes of
            # it: the judge says which host, and ends this process.
            self.at("stopped with an error in")  # no hanging step
            self.timeout = min(self.timeout, 5 * PULSE)
            time.sleep(self.timeout + 3 * PULSE)
        self.ended.set()
        code = code_of(error)
        first = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        if isinstance(error, SystemExit) and code > 128:
            first = f"it was stopped by {signal.Signals(code - 128).name}"
        why = str(error) if isinstance(error, Different) else f"host {self.host} ({self.name}) ended: {first}"
        self._tell(why, code)
        atexit.register(_end_at_exit, self.end, code)


def code_of(error: BaseException) -> int:
    """The exit code that the command line gives to an exception."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    known = isinstance(error, UserError | FloatingPointError) or (isinstance(error, Exception) and fault(error))
    return 2 if known else 1


def _end_at_exit(end: Callable[[int], object], code: int) -> None:
    """Ends the process before jax waits for hosts that do not come; it was registered after jax's own."""
    _flush()
    end(code)


def _flush() -> None:
    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()

    flusher = threading.Thread(target=flush, daemon=True)  # the main thread may hold the stream
    flusher.start()
    flusher.join(1.0)


_current: Watch | None = None
_watches = 0  # of this process so far


def at(doing: str, step: int | None = None) -> None:
    """`Watch.at` of the run of this process, if it has several hosts."""
    if _current is not None:
        _current.at(doing, step)


def is_last(stop: bool, step: int) -> bool | None:
    """`Watch.is_last` of the run of this process; None if no watch is kept."""
    return None if _current is None else _current.is_last(stop, step)


def current() -> Watch | None:
    """The watch of the run of this process, if it has several hosts."""
    return _current


@contextlib.contextmanager
def watching(
    timeout: float = TIMEOUT, together: type[BaseException] | tuple[type[BaseException], ...] = ()
) -> Iterator[None]:
    """A context for a run of the hosts that `jax.distributed` has joined; nothing is done on a single host.

    Args:
      timeout: s without a heartbeat, after which a host counts as lost.
      together: exceptions that all hosts raise at the same point.
    """
    from jax._src.distributed import global_state  # jax shows its store nowhere else

    global _current, _watches
    if not jax.distributed.is_initialized() or global_state.num_processes == 1:
        yield
        return
    _watches += 1
    store = _Below(Coordinator(global_state.client), f"kdjax/{_watches}/")
    watch = Watch(store, global_state.process_id, global_state.num_processes, timeout=timeout, together=together)
    before = _on_sigterm()
    try:
        with watch:
            _current = watch
            yield
    finally:
        _current = None
        if before is not None:
            signal.signal(signal.SIGTERM, before)


class _Below:
    """A store below a prefix."""

    def __init__(self, store: Store, prefix: str) -> None:
        self.store, self.prefix = store, prefix

    def set(self, key: str, value: str) -> None:
        self.store.set(self.prefix + key, value)

    def get(self, key: str, seconds: float) -> str | None:
        return self.store.get(self.prefix + key, seconds)

    def below(self, prefix: str) -> dict[str, str]:
        return self.store.below(self.prefix + prefix)


def _on_sigterm() -> Any:  # noqa: ANN401 - a handler
    """While nothing needs saving, SIGTERM ends this host, and the others learn of it; returns the handler before."""

    def handle(number: int, frame: FrameType | None) -> NoReturn:
        print("kdjax train: stopped outside of the training steps; the same command continues", file=sys.stderr)
        raise SystemExit(128 + number)

    with contextlib.suppress(ValueError):  # only the main thread can set handlers
        return signal.signal(signal.SIGTERM, handle)
    return None
