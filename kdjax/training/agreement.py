"""What must be the same on all hosts of a run, compared before anything is computed."""

import contextlib
import hashlib
import json
import platform
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import jax

import kdjax
from kdjax import data, detectors, methods, resources
from kdjax.errors import listed
from kdjax.training import cluster
from kdjax.training import config as settings
from kdjax.training.cluster import Different, Watch
from kdjax.training.config import Config

# Settings that may differ between hosts: paths of what is compared by content, and what only concerns one machine.
LOCAL = ("compile_cache", "data.cache", "data.keep", "data.root", "data.unlabelled", "data.workers")
_WEIGHTS = (".safetensors", ".npz", ".pth", ".pt", ".onnx", ".json")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_HASH = 12  # digits of a hash in a message
_SHARED = 10.0  # s, after which a file that host 0 has written counts as not seen
_SHOWN = 3  # differences in a message


def check(config: Config, dataset: data.Dataset, folder: Path) -> None:
    """Compares this host with the others, if there are any; all of them call this function.

    Args:
      config: the settings.
      dataset: of the run.
      folder: the workdir.

    Raises:
      Different: names what differs and on which hosts; the same message on all of them.
    """
    watch = cluster.current()
    if watch is None:
        return
    watch.at("compares itself with the others before")
    with marked(watch, folder) as sees:
        watch.store.set(
            f"facts/{watch.host}", json.dumps([watch.name, str(folder), sees, facts(config, dataset, folder)])
        )
        everyones = [json.loads(watch.wait_for(f"facts/{host}")) for host in range(watch.hosts)]
    names = [f"host {host} ({name})" for host, (name, *_) in enumerate(everyones)]
    for name, (_, where, shares, _) in zip(names, everyones, strict=True):
        if not shares:
            raise Different(
                f"workdir: {where} of {name} is not the folder {everyones[0][1]} of {names[0]}: choose one on a file "
                "system that all hosts share"
            )
    if found := differences([one for *_, one in everyones], names):
        more = f"; and {len(found) - _SHOWN} more" * (len(found) > _SHOWN)
        raise Different(f"{'; '.join(found[:_SHOWN])}{more}: all hosts must run the same")


@contextlib.contextmanager
def marked(watch: Watch, folder: Path) -> Iterator[bool]:
    """Whether this host sees the workdir of host 0, which has a file of a random name while the body runs."""
    if watch.host == 0:
        for left in folder.glob(".host0.*"):  # by a process that was killed
            left.unlink(missing_ok=True)
        mark = folder / f".host0.{secrets.token_hex(8)}"
        mark.touch()
        try:
            watch.store.set("mark", mark.name)
            yield True
        finally:
            mark.unlink(missing_ok=True)
        return
    mark, until = folder / watch.wait_for("mark"), time.monotonic() + _SHARED
    while not mark.exists() and time.monotonic() < until:  # a network file system may show it late
        time.sleep(0.2)
    yield mark.exists()


def facts(config: Config, dataset: data.Dataset, folder: Path) -> dict[str, Any]:
    """What must be the same on all hosts, by the name that messages give it.

    Args:
      config: the settings.
      dataset: of the run.
      folder: the workdir.

    Returns:
      JSON-able values; of contents their SHA-256.
    """
    chosen = settings.flat(json.loads(config.to_json()))
    found = {f"config.{name}": value for name, value in chosen.items() if name not in LOCAL}
    models = {"config.student.weights": config.student.weights, "config.teacher.weights": config.teacher.weights}
    models |= {f"config.teachers.{name}.weights": one.weights for name, one in config.teachers.items()}
    found |= {f"the content of {name}": content(path) for name, path in models.items() if path}
    found["the data (the hash of its images, boxes and classes)"] = dataset.fingerprint[:_HASH]
    found |= {name: metadata.version(name) for name in _PACKAGES}
    found |= {"Python": platform.python_version(), "OpenCV": cv2.__version__, "kdjax": kdjax.__version__}
    found["the code of kdjax (the hash of its files)"] = code(Path(kdjax.__file__).parent)
    for kind, package in (("methods", methods), ("detectors", detectors)):
        own = [code(Path(path)) for path in [*package.__path__][1:]]  # the first is kdjax's
        found[f"the {kind} of KDJAX_PLUGINS (the hash of their files)"] = " ".join(own)
    found["the number of devices"] = jax.local_device_count()
    found["the kind of devices"] = jax.local_devices()[0].device_kind
    found |= {name: getattr(jax.config, name) for name in ("jax_enable_x64", "jax_default_matmul_precision")}
    found["the last checkpoint"] = checkpoint(folder)
    return found


def content(path: str) -> str:
    """The SHA-256 of a file of weights, or of those in a folder and in its student/; "" if there are none."""
    top = resources.model_path(path)
    files = [top] if top.is_file() else [*top.glob("*"), *top.glob("student/*")]
    return _hash(top, [file for file in files if file.is_file() and file.suffix.lower() in _WEIGHTS])


def code(root: Path) -> str:
    """The SHA-256 of the Python files below a folder."""
    return _hash(root, [*root.rglob("*.py")])


def _hash(root: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        name, size = str(file.relative_to(root)), file.stat().st_size
        digest.update(f"{name} {size}\n".encode(errors="surrogateescape"))
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:_HASH] if files else ""


def checkpoint(folder: Path) -> str:
    """The step that a run in a folder continues from, with the hash of its note, which has those of its arrays."""
    below = folder / "checkpoints"
    steps = sorted((int(path.name) for path in below.glob("*") if path.name.isdecimal()), reverse=True)
    for step in steps:
        notes = [path for path in (below / str(step) / "note").glob("*") if path.is_file()]
        return f"of step {step}, {_hash(below, notes)}"
    return "none"


def differences(everyones: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """What differs, with the value on each host.

    Args:
      everyones: the facts of each host.
      names: what messages call the hosts.

    Example:
      >>> differences([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1, "b": 2}], ["host 0", "host 1", "host 2"])
      ['b is 2 on host 0, host 2 and 3 on host 1']
    """
    found = []
    for name in dict.fromkeys(name for facts in everyones for name in facts):
        by_value: dict[str, list[str]] = {}
        for host, facts in zip(names, everyones, strict=True):
            value = _shown(facts[name]) if name in facts else "missing"
            by_value.setdefault(value, []).append(host)
        if len(by_value) > 1:
            told = [f"{value} on {listed(those)}" for value, those in by_value.items()]
            found.append(f"{name} is {' and '.join(told)}")
    return found


def _shown(value: object) -> str:
    """A value in a message."""
    return str(value) or "empty" if isinstance(value, str) else repr(value)
