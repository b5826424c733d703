"""Spoilt files of weights: each is imported with the right values, or refused in one sentence.

The right values come from readers that are written down here and share no code with kdjax's. A file is made (names and
values are changed in ways whose result is known), and then its bytes are damaged.
"""

import functools
import importlib.util
import io
import json
import re
import struct
import tempfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import load_file

from kdjax import weights
from kdjax.detectors import build
from tests.fuzz.runs import end_of, fuzz

TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "I8": np.int8,
}  # fmt: skip
WRAPPERS = (
    "module.",
    "_orig_mod.",
    "ema.",
    "model_ema.",
    "state_dict.",
    "model.",
    "ema_state_dict.",
    "model_state_dict.",
)
KINDS = ("npz", "safetensors", *(("pth",) if importlib.util.find_spec("torch") else ()))
DETECTOR = "rtmdet_pico"
GOOD = ("none", "type", "order", "counters")
BAD = ("drop", "rename", "nan", "inf", "variance", "axis", "integers", "copy")
CLASSES = ("red", "blue")


@functools.cache
def sound() -> dict[str, np.ndarray]:
    """A state dict of PyTorch; nobody may change it."""
    detector = build(DETECTOR, len(CLASSES))
    return weights.to_torch(detector, *detector.init(jax.random.key(1)))


def place(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """Where a folder of kdjax has an array of a PyTorch state dict, and in which layout."""
    *modules, leaf = name.split(".")
    if leaf in ("running_mean", "running_var"):
        return "/".join(["stats", *modules, leaf.removeprefix("running_")]), value
    if leaf == "weight":
        leaf, value = ("kernel", np.moveaxis(value, (0, 1), (3, 2))) if value.ndim == 4 else ("scale", value)
    return "/".join(["params", *modules, leaf]), value


def check_values(folder: Path, state: dict[str, np.ndarray]) -> None:
    """The folder has every value of the state, and no others."""
    got = load_file(folder / "model.safetensors")
    found = set()
    for name, value in state.items():
        if not name.endswith("num_batches_tracked"):
            path, wanted = place(name, value.astype(np.float32))
            if path not in got:  # an array that the levels share
                path = re.sub("_convs/[12]/", "_convs/0/", path)
            np.testing.assert_array_equal(got[path], wanted, err_msg=name)
            found.add(path)
    assert found == set(got)


def read_safetensors(content: bytes) -> dict[str, np.ndarray]:
    """A reader of sound files that is as slow and short as can be."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    data = content[8 + size :]
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], TYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }


def write_safetensors(state: dict[str, np.ndarray]) -> bytes:
    codes = {np.dtype(kind): code for code, kind in TYPES.items()}
    header, data = {}, b""
    for name, value in state.items():
        begin, data = len(data), data + np.ascontiguousarray(value).tobytes()
        header[name] = {"dtype": codes[value.dtype], "shape": value.shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write(kind: str, state: dict[str, np.ndarray], packed: bool) -> bytes:
    """The content of a file; `packed` chooses the rarer of two forms."""
    if kind == "safetensors":
        return write_safetensors(state)
    buffer = io.BytesIO()
    if kind == "npz":
        (np.savez_compressed if packed else np.savez)(buffer, **state)
    else:
        import torch

        tensors = {name: tensor_of(value) for name, value in state.items()}
        torch.save({"epoch": 3, "state_dict": tensors}, buffer, _use_new_zipfile_serialization=not packed)
    return buffer.getvalue()


def tensor_of(value: np.ndarray):
    import torch

    own = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
    if value.dtype.name in own:
        return torch.tensor(value.astype(np.float32)).to(own[value.dtype.name])
    return torch.tensor(value)


def change(draw, kind: str, packed: bool, state: dict, flaw: str) -> tuple[str, dict, dict | None]:
    """A prefix, the names and values behind it, and the state that they stand for; None: it must be refused."""
    names = sorted(name for name in state if not name.endswith("num_batches_tracked"))
    one = draw(st.sampled_from(names))
    right = dict(state)
    if flaw == "type":
        kinds = [np.float16, np.float64]
        if kind != "npz":
            kinds += [ml_dtypes.bfloat16]
        if kind == "safetensors" or (kind == "pth" and not packed):  # PyTorch's old form has no float8
            kinds += [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
        to = draw(st.sampled_from(kinds))
        right = {name: value.astype(to) if value.dtype == np.float32 else value for name, value in state.items()}
    if flaw == "order":
        order = np.random.default_rng(draw(st.integers(0, 99))).permutation(sorted(state))
        right = {str(name): np.asfortranarray(state[name]) for name in order}
    if flaw == "counters":
        right = {name: state[name] for name in names}
    made, refused = dict(right), flaw in BAD
    if flaw == "drop":
        del made[one]
    elif flaw == "rename":
        made[one + "_"] = made.pop(one)
    elif flaw in ("nan", "inf"):
        made[one] = made[one].copy()
        made[one].flat[draw(st.integers(0, made[one].size - 1))] = draw(st.sampled_from([1, -1])) * float(flaw)
    elif flaw == "variance":
        one = draw(st.sampled_from([name for name in names if name.endswith("running_var")]))
        made[one] = made[one] - 2
    elif flaw == "axis":
        made[one] = made[one][None]
    elif flaw == "integers":
        made[one] = np.rint(made[one]).astype(np.int8)
    elif flaw == "copy":
        one = draw(st.sampled_from([name for name in names if "reg_convs.1." in name and name.endswith("conv.weight")]))
        made[one] = made[one] + 1
    prefix = "".join(draw(st.lists(st.sampled_from(WRAPPERS), max_size=3)))
    if draw(st.integers(0, 9)) == 0:
        prefix, refused = prefix + draw(st.sampled_from(["net.", "detector.", "x.y."])), True
    return prefix, made, None if refused else right


def damage(draw, content: bytes) -> bytes:
    """The bytes of a file after an accident."""
    how = draw(st.sampled_from(["none", "cut", "bit", "zeros", "insert", "append", "swap"]))
    at = draw(st.integers(0, len(content) - 1))
    if draw(st.booleans()):  # the places that matter are at the two ends
        at = draw(st.sampled_from([at % 4096, len(content) - 1 - at % 4096]))
    spoilt = bytearray(content)
    if how == "cut":
        del spoilt[at:]
    elif how == "bit":
        spoilt[at] ^= 1 << draw(st.integers(0, 7))
    elif how == "zeros":
        spoilt[at : at + 64] = bytes(len(spoilt[at : at + 64]))
    elif how == "insert":
        spoilt[at:at] = draw(st.binary(min_size=1, max_size=8))
    elif how == "append":
        spoilt += draw(st.binary(min_size=1, max_size=64))
    elif how == "swap":
        spoilt[at : at + 64], spoilt[:64] = spoilt[:64], spoilt[at : at + 64]
    return bytes(spoilt)


def check(data, flaw: str, *, damaged: bool) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    packed = data.draw(st.booleans())
    prefix, made, right = change(data.draw, kind, packed, sound(), flaw)
    whole = write(kind, {prefix + name: value for name, value in made.items()}, packed)
    content = damage(data.draw, whole) if damaged else whole
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / f"w.{kind}").write_bytes(content)
        (folder / "names.txt").write_text("\n".join(CLASSES))
        code, told = end_of(
            *("import-weights", str(folder / f"w.{kind}"), f"--detector={DETECTOR}", f"--out={folder / 'out'}"),
            *(f"--classes={folder / 'names.txt'}", "--image-size=64,64"),
        )
        assert code == 0 or not (folder / "out").exists()
        if content == whole:
            assert (code == 0) == (right is not None), told
        if code == 0 and kind == "safetensors":  # without checksums: the values are those that the file has now
            right = {name.removeprefix(prefix): value for name, value in read_safetensors(content).items()}
        if code == 0 and (content == whole or kind != "pth" or not packed):  # nor has PyTorch's old form
            check_values(folder / "out", right)


@pytest.mark.parametrize("flaw", [*GOOD, *BAD])
@fuzz(2)
def test_changed_files(data, flaw):
    check(data, flaw, damaged=False)


@fuzz(10)
def test_damaged_files(data):
    check(data, "none", damaged=True)


@pytest.mark.user_input(
    "Weights",
    "300 files of weights spoilt at random (`make test-all`)",
    "read with the right values, or refused in one sentence",
)
@pytest.mark.slow
@fuzz(300)
def test_300_spoilt_files(data):
    check(data, data.draw(st.sampled_from((*GOOD, *BAD))), damaged=data.draw(st.booleans()))
