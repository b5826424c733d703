"""The files that hold arrays: every type, sharded files, and what is no weights at all."""

import io
import json
import os
import struct
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from kdjax import weights
from tests.fuzz.test_weights import write_safetensors


def refused(path) -> str:
    with pytest.raises(ValueError, match=path.name) as caught:
        weights.read_checkpoint(path)
    return str(caught.value).removeprefix(f"{path}: ")


def npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    return b"\x93NUMPY" + bytes((version, 0)) + struct.pack("<H", len(header)) + header.encode() + data


def pack(path, *members: tuple[str, bytes], method: int = zipfile.ZIP_STORED):
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w", method) as archive:  # of equal names
        for name, content in members:
            archive.writestr(name, content)
    return path


@pytest.mark.user_input(
    "Weights", "a git-lfs pointer, an HTML or XML page, a text", "refused: download the file itself, not its page"
)
@pytest.mark.user_input(
    "Weights",
    "an empty file, a gzip, another binary format",
    "refused: the file is empty; unpack it; it is not a file of weights",
)
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the file is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
            "it is a pointer of git-lfs, not the weights: download them with `git lfs pull`",
        ),
        (
            b"\n <!DOCTYPE html><title>x",
            "it is an HTML or XML page, not weights: download the file itself, not its page",
        ),
        (
            b'<?xml version="1.0"?><Error>',
            "it is an HTML or XML page, not weights: download the file itself, not its page",
        ),
        (b"Entry not found", "it is a text file, not weights: it begins with 'Entry not found'"),
        (("ä" * 300).encode(), f"it is a text file, not weights: it begins with '{'ä' * 40}'"),
        (b"\x1f\x8b\x08\x00", "it is compressed with gzip: unpack it"),
        (b"\x89HDF\r\n", "it is not a file of npz, safetensors or PyTorch, or its beginning is damaged"),
        (
            struct.pack("<Q", 10**9) + b"{}",
            "the weights cannot be read: the file is damaged or cut off: Error while deserializing: header too large",
        ),
    ],
)
def test_what_is_downloaded_instead_of_weights(tmp_path, content, told):
    for name in ("w.safetensors", "w.npz", "w.pth", "w.onnx"):
        (tmp_path / name).write_bytes(content)
        if name != "w.onnx" or content[:1] not in (b"\x89", b"\x00"):
            assert refused(tmp_path / name) == told


@pytest.mark.user_input("Weights", "float16, float64, bfloat16 and float8 in safetensors", "read")
@pytest.mark.user_input("Weights", "float4; bfloat16 in an npz", "refused: store it as float32")
def test_types_that_numpy_lacks(tmp_path):
    values = np.float32([[0, 0.5], [-2, 64]])
    for kind in (np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        (tmp_path / "w.safetensors").write_bytes(write_safetensors({"a.b": values.astype(kind)}))
        [(name, read)] = weights.read_checkpoint(tmp_path / "w.safetensors")[0].items()
        assert name == "a.b" and read.dtype == kind
        np.testing.assert_array_equal(read.astype(np.float32), values)
    content = write_safetensors({"a": np.zeros(8, np.int8)}).replace(b'"I8", "shape": [8]', b'"F4", "shape":[16]')
    (tmp_path / "w.safetensors").write_bytes(content)
    assert refused(tmp_path / "w.safetensors") == "a has the type F4, which kdjax does not read: store it as float32"
    np.savez(tmp_path / "w.npz", a=values.astype(ml_dtypes.bfloat16))  # NumPy forgets the type
    told = "a is not an array of numbers but of |V2: store bfloat16 and float8 as float32"
    assert refused(tmp_path / "w.npz") == told


@pytest.mark.user_input("Weights", "an npz in Fortran's order, big-endian, or with empty arrays", "read")
def test_arrays_of_an_npz_have_their_order_and_bytes(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.savez_compressed(tmp_path / "w.npz", a=np.asfortranarray(values), b=values.astype(">f8"), c=values[:, :0])
    read, _ = weights.read_checkpoint(tmp_path / "w.npz")
    np.testing.assert_array_equal(read["a"], values)
    np.testing.assert_array_equal(read["b"], values)
    assert read["c"].shape == (2, 0)


@pytest.mark.user_input(
    "Weights",
    "an npz that declares 4 TB, or whose header is damaged",
    "refused: declares 4 TB, but the file holds 8 bytes",
)
def test_an_npz_that_declares_more_than_it_holds(tmp_path):
    huge = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }\n"
    told = "the header of a declares 4 TB ((1000000, 1000000) of float32), but the file holds 8 bytes"
    assert refused(pack(tmp_path / "huge.npz", ("a.npy", npy(huge, bytes(8))))) == told
    odd = huge.replace("(1000000, 1000000)", "(-1, -2)")
    told = "the header of a declares 8 bytes ((-1, -2) of float32), but the file holds 8 bytes"
    assert refused(pack(tmp_path / "odd.npz", ("a.npy", npy(odd, bytes(8))))) == told
    for header in ("(" * 5000, "{'descr': '<f4'}", "\x00"):
        assert "the header of a is damaged" in refused(pack(tmp_path / "x.npz", ("a.npy", npy(header))))
    told = "the weights cannot be read: the header of a is damaged: version (7, 0) of npy is not used for numbers"
    assert refused(pack(tmp_path / "new.npz", ("a.npy", npy(huge, version=7)))) == told


@pytest.mark.user_input("Weights", "80 MB of zeros in 80 kB", "refused before it is unpacked")
def test_a_bomb_is_not_unpacked(tmp_path):
    """80 MB of zeros in 80 kB."""
    zeros = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (20000000,), }\n") + bytes(8 * 10**7)
    for name, member in (("w.npz", "a.npy"), ("w.pth", "w/data.pkl")):
        told = refused(pack(tmp_path / name, (member, zeros), method=zipfile.ZIP_DEFLATED))
        assert told.startswith("its arrays would take 80 MB, but the file has 77.") and told.endswith("no weights")


@pytest.mark.user_input("Weights", "a file larger than the memory", "refused with both sizes")
def test_a_file_that_is_larger_than_the_memory(tmp_path):
    with open(tmp_path / "w.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 2) + b"{}")
        os.truncate(file.fileno(), 2**43)  # sparse: nothing is stored
    assert refused(tmp_path / "w.safetensors").startswith(
        "the file has 8.796 TB, more than the memory of this machine ("
    )


@pytest.mark.user_input(
    "Weights", "an npz with a name twice, another member, a wrong checksum", "refused with the name"
)
def test_archives(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3, np.float32))
    two = ("a.npy", buffer.getvalue()), ("a.npy", buffer.getvalue())
    assert refused(pack(tmp_path / "w.npz", *two)) == "the weights cannot be read: two of its arrays have the name a"
    told = "it is not an npz file: it holds w.pth, which is no .npy: unpack it if it is a zip"
    assert refused(pack(tmp_path / "w.npz", ("w.pth", b"x"))) == told
    whole = bytearray(pack(tmp_path / "w.npz", two[0]).read_bytes())
    whole[60 + len(buffer.getvalue()) - 40] ^= 1
    (tmp_path / "w.npz").write_bytes(whole)
    told = "the weights cannot be read: the file is damaged: the checksum of a.npy differs"
    assert refused(tmp_path / "w.npz") == told


@pytest.mark.user_input("Weights", "sharded safetensors, by their index or folder", "read")
@pytest.mark.user_input("Weights", "one part of sharded weights", "refused: give their index")
@pytest.mark.user_input(
    "Weights", "an index that is damaged or does not fit its parts", "refused with the part that does not fit"
)
def test_sharded_weights(tmp_path, detector, state):
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    index = tmp_path / "model.safetensors.index.json"
    for part, inside in parts.items():
        save_file({f"module.{name}": state[name] for name in inside}, tmp_path / part)

    def write(**more: str):
        listed = {f"module.{name}": part for part, inside in parts.items() for name in inside}
        index.write_text(json.dumps({"metadata": {}, "weight_map": listed | more}))

    write()
    for path in (index, tmp_path):
        read, classes = weights.read_checkpoint(path)
        assert classes is None and set(read) == set(state)
        assert all(np.array_equal(read[name], state[name]) for name in state)
    told = "it is part 1 of 2 of the weights: give their index, model.safetensors.index.json beside it"
    assert refused(tmp_path / "model-00001-of-00002.safetensors") == told
    write(x="../x.safetensors")
    assert refused(index) == "it names '../x.safetensors': the parts must lie beside their index"
    write(x="model-00003-of-00003.safetensors")
    with pytest.raises(ValueError, match=r"model-00003-of-00003.safetensors: there is no such file, but model.saf"):
        weights.read_checkpoint(index)
    write(**{f"module.{names[0]}": "model-00002-of-00002.safetensors"})
    with pytest.raises(ValueError, match=rf"model-00001.*: it is not the file that {index.name} describes: it holds"):
        weights.read_checkpoint(index)
    write(x="model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=rf"model-00002.*: it is not the file that {index.name} describes: it lacks"):
        weights.read_checkpoint(index)
    for text in ("{}", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "[" * 100_000):
        index.write_text(text)
        assert "cannot be read as the index of sharded weights" in refused(index) or "it is a text file" in refused(
            index
        )
    index.write_text("<html>")
    assert refused(index).startswith("it is an HTML or XML page")
    (tmp_path / "b.bin.index.json").write_text("{}")
    told = "the folder has several indices of weights (*.index.json): choose a file of weights"
    with pytest.raises(ValueError, match=r"the folder has several indices of weights \(\*.index.json\): choose a file"):
        weights.read_checkpoint(tmp_path)


@pytest.mark.user_input("Weights", ".pt, .ckpt, .bin, .pth.tar, in PyTorch's old and new form", "read")
def test_pytorch_files_by_any_suffix(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {"model._orig_mod.a.weight": torch.ones(2), "model._orig_mod.a.bias": torch.zeros(2)}
    for suffix in (".pt", ".ckpt", ".bin", ".pth.tar", ".PTH"):
        for old in (False, True):
            torch.save({"state_dict": tensors}, tmp_path / f"w{suffix}", _use_new_zipfile_serialization=not old)
            read, _ = weights.read_checkpoint(tmp_path / f"w{suffix}")
            assert set(read) == {"a.weight", "a.bias"} and read["a.weight"].sum() == 2
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert weights.read_checkpoint(tmp_path / "w.pth")[0]["a.weight"].sum() == 2


@pytest.mark.user_input("Weights", "a flipped bit in a .pth, which PyTorch reads", "refused: the checksum differs")
def test_pytorch_does_not_verify_checksums_but_kdjax_does(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.arange(6.0)}, tmp_path / "w.pth")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    content[content.index(np.float32(5).tobytes()) + 3] ^= 1
    (tmp_path / "w.pth").write_bytes(content)
    assert torch.load(tmp_path / "w.pth")["a"][5] == 20
    assert refused(tmp_path / "w.pth").endswith("the file is damaged: the checksum of w/data/0 differs")


@pytest.mark.user_input(
    "Weights", "sparse, quantised, complex and meta tensors", "refused: save it dense; save it as float32"
)
@pytest.mark.user_input(
    "Weights", "a list, a TorchScript program, a dict that holds itself", "refused: holds a list, not weights by name"
)
def test_tensors_without_numbers(tmp_path):
    torch = pytest.importorskip("torch")
    eye = torch.eye(3)

    def told(value) -> str:
        torch.save(value, tmp_path / "w.pth")
        return refused(tmp_path / "w.pth")

    with warnings.catch_warnings(action="ignore"):  # PyTorch's, of sparse and quantised tensors
        sparse = "a.b is a sparse tensor (sparse_coo): save it dense, with tensor.to_dense()"
        assert told({"a.b": eye.to_sparse()}) == sparse
        assert told({"a.b": eye.to_sparse_csr()}) == sparse.replace("coo", "csr")
        quantised = torch.quantize_per_tensor(eye, 1.0, 0, torch.qint8)
        assert told({"a": quantised}) == "a has the type qint8: save it as float32"
    meta = "a is a tensor without values (device meta): save the weights after they are loaded"
    assert told({"a": torch.zeros(3, device="meta")}) == meta
    assert told({"a": eye.to(torch.complex64)}) == "a has the type complex64: save it as float32"
    assert told({0: 1, "epoch": 2}) == "it holds no arrays by name"
    assert told([eye]) == "the file holds a list, not weights by name"
    huge = told({"a": torch.zeros(1).expand(10**12)})
    assert huge.startswith("its arrays would take 4 TB, but the file has ") and huge.endswith(": these are no weights")
    cycle: dict = {"a": eye}
    cycle["state_dict"] = cycle
    assert told(cycle) == "state_dict is a dict that holds itself"
    torch.save({0: eye, "b": {1: eye}, "meta": {"CLASSES": eye}}, tmp_path / "w.pth")
    read, classes = weights.read_checkpoint(tmp_path / "w.pth")
    assert set(read) == {"0", "b.1"} | {"meta.CLASSES"} and classes is None
    torch.save({"a": eye.to(torch.float8_e4m3fn), "b": torch.nn.Parameter(eye.bfloat16()).t()}, tmp_path / "w.pth")
    assert {name: value.dtype.name for name, value in weights.read_checkpoint(tmp_path / "w.pth")[0].items()} == {
        "a": "float32",
        "b": "float32",
    }
    with warnings.catch_warnings(action="ignore"):  # deprecated, but such files are about
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(tmp_path / "w.pth"))
    assert refused(tmp_path / "w.pth").startswith("it is a TorchScript program, and kdjax never runs code from a file")
