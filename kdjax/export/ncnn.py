"""NCNN's files, a graph in .param and its weights in a .bin beside it; needs `kdjax[ncnn]`.

They are converted from ONNX files by the program pnnx. NCNN has no NMS: the files hold the maps of the head.
"""

import importlib
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdjax.errors import UserError
from kdjax.export import graphs
from kdjax.inference.model import Model

if TYPE_CHECKING:
    from onnx import ModelProto

# As `verify.TOLERANCE`, of every cell of the maps, where detections leave out the worst. Of YOLOX-nano, whose logits
# reach 25, it is 3.6e-4 on 8 images; onnxruntime's maps of the same network differ by 1.1e-4.
TOLERANCE = 5e-4


def check(model: Model) -> None:
    """Checks that a detector can be written.

    Raises:
      UserError: it does more than NCNN can behind its maps.
    """
    what = f"{model.path}: {model.detector.name}"
    if model.detector.propose is not None:
        raise UserError(f"{what}: its second stage is computed behind an NMS, which NCNN does not have: use ONNX")
    if model.detector.head is None:
        raise UserError(f"{what} chooses its queries by a sort, which NCNN does not have: use ONNX")
    if model.detector.masks:
        raise UserError(f"{what}: its masks need a bilinear Resize, which pnnx does not convert for NCNN: use ONNX")


def write(source: str | Path, path: str | Path, *, half: bool = False) -> None:
    """Writes an ONNX file of the head's maps as NCNN's.

    The input is `image`, f32[3, H, W], RGB in 0 .. 255, as `ncnn.Mat.from_pixels` makes it; the outputs are the maps
    f32[H, W, C] under their names.

    Args:
      source: the ONNX file for one image, written with `raw`.
      path: the .param; the weights go to the .bin of the same name.
      half: whether weights are stored as float16.

    Raises:
      UserError: pnnx cannot convert it, or NCNN lacks one of its operators.
    """
    import onnx

    path, graph = Path(path), onnx.load(str(source))
    names = [entry.name for entry in graph.graph.output]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(with_convolutions(_with_floats(graph)), str(file))
        command = [str(_pnnx()), file.name, f"fp16={int(half)}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        param, weights = file.with_suffix(".ncnn.param"), file.with_suffix(".ncnn.bin")
        if done.returncode or not (param.exists() and weights.exists()):
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            raise UserError(f"pnnx cannot convert it (code {done.returncode}): {lines[-1] if lines else 'no reason'}")
        if unknown := sorted(set(re.findall(r"^todo (\S+)", done.stdout + done.stderr, re.MULTILINE))):
            raise UserError(f"NCNN does not have {', '.join(unknown)}: use another format")
        path.write_text(_renamed(param.read_text(), {"in0": "image"} | {f"out{i}": n for i, n in enumerate(names)}))
        path.with_suffix(".bin").write_bytes(weights.read_bytes())


def _pnnx() -> Path:
    """The program; its package cannot be imported without PyTorch, which it does not need."""
    found = importlib.util.find_spec("pnnx")
    folder = Path(next(iter(found.submodule_search_locations))) if found and found.submodule_search_locations else None
    for name in ("pnnx", "pnnx.exe"):
        if folder and (folder / name).is_file():
            return folder / name
    raise UserError("NCNN needs pnnx: pip install 'kdjax[ncnn]'")


def _with_floats(graph: "ModelProto") -> "ModelProto":
    """The graph with an input f32[1, 3, H, W] instead of u8[1, H, W, 3]: NCNN has neither bytes nor channels last."""
    from onnx import TensorProto, helper

    image, nodes = graph.graph.input[0], graph.graph.node
    _, height, width, channels = (side.dim_value for side in image.type.tensor_type.shape.dim)
    [cast] = [node for node in nodes if image.name in node.input]
    [back] = [node for node in nodes if cast.output[0] in node.input]  # the normalisation, a convolution, reads it
    assert (cast.op_type, back.op_type) == ("Cast", "Transpose"), "every network begins so"
    first = helper.make_tensor_value_info(image.name, TensorProto.FLOAT, [1, channels, height, width])
    graph.graph.input.remove(image)
    graph.graph.input.insert(0, first)
    for node in (cast, back):
        nodes.remove(node)
    for node in nodes:
        node.input[:] = [first.name if name == back.output[0] else name for name in node.input]
    return graph


def with_convolutions(graph: "ModelProto") -> "ModelProto":
    """The graph with a strided convolution instead of SpaceToDepth and the choice of its channels.

    pnnx puts the channels into another order, and takes the first one instead of choosing among them.
    """
    from onnx import helper, numpy_helper, shape_inference

    nodes, made = graph.graph.node, shape_inference.infer_shapes(graph).graph
    shapes = {entry.name: [side.dim_value for side in entry.type.tensor_type.shape.dim]
              for entry in (*made.value_info, *made.input)}  # fmt: skip
    arrays = {entry.name: entry for entry in graph.graph.initializer}
    for node in [node for node in nodes if node.op_type == "SpaceToDepth"]:
        size, channels = helper.get_node_attr_value(node, "blocksize"), shapes[node.input[0]][1]
        kernel = np.zeros((size, size, channels, channels, size, size), np.float32)
        for row, column, channel in np.ndindex(size, size, channels):
            kernel[row, column, channel, channel, row, column] = 1
        kernel, output = kernel.reshape(-1, channels, size, size), node.output[0]
        readers = [one for one in nodes if output in one.input]
        chooses = len(readers) == 1 and readers[0].op_type == "Gather" and readers[0].input[1] in arrays
        if chooses and [one.i for one in readers[0].attribute if one.name == "axis"] == [1]:
            kernel = kernel[numpy_helper.to_array(arrays[readers[0].input[1]])]
            output = readers[0].output[0]
            nodes.remove(readers[0])
        name = f"{node.output[0]}_kernel"
        graph.graph.initializer.append(numpy_helper.from_array(kernel, name))
        conv = helper.make_node("Conv", [node.input[0], name], [output], strides=[size] * 2, kernel_shape=[size] * 2)
        place = [*nodes].index(node)
        nodes.remove(node)
        nodes.insert(place, conv)
    return graph


def _renamed(param: str, names: dict[str, str]) -> str:
    """A .param with other names of blobs: of a layer "kind name inputs outputs blob ... key=value ..."."""
    lines = param.splitlines()
    for place, line in enumerate(lines[2:], 2):
        words = line.split()
        blobs = int(words[2]) + int(words[3])
        words[4 : 4 + blobs] = [names.get(word, word) for word in words[4 : 4 + blobs]]
        lines[place] = " ".join([f"{words[0]:24s} {words[1]:24s}", *words[2:]])
    return "\n".join(lines) + "\n"


def network(path: str | Path, *, threads: int = 0) -> Any:  # noqa: ANN401 - ncnn.Net
    """NCNN's network of a file, on the CPU, computing in float32.

    Args:
      path: the .param; the .bin lies beside it.
      threads: that compute; 0 leaves it to NCNN.

    Raises:
      UserError: NCNN cannot read it.
    """
    made = importlib.import_module("ncnn").Net()
    options = made.opt
    options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = False
    options.use_bf16_storage = options.use_vulkan_compute = False
    if threads:
        options.num_threads = threads
    for file, load in ((Path(path), made.load_param), (Path(path).with_suffix(".bin"), made.load_model)):
        if not file.is_file():
            raise UserError(f"{file}: there is no such file: NCNN reads {Path(path).name} and its .bin")
        if load(str(file)):
            raise UserError(f"{file}: NCNN cannot read it")
    return made


def outputs(running: Any, image: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:  # noqa: ANN401
    """The maps f32[H, W, C] that a `network` makes of an image u8[1, H, W, 3]."""
    extractor = running.create_extractor()
    pixels = np.ascontiguousarray(np.moveaxis(image[0], 2, 0), np.float32)  # which the Mat does not copy
    blob = importlib.import_module("ncnn").Mat(pixels)
    extractor.input("image", blob)
    found = []
    for name in names:
        code, value = extractor.extract(name)
        if code:
            raise UserError(f"NCNN cannot compute {name} (code {code})")
        found.append(np.array(value))
    return found


def runner(path: str | Path, model: Model) -> Callable[..., Sequence[np.ndarray]]:
    """A function from an image u8[1, H, W, 3] to the maps of an NCNN file, each f32[1, H, W, C]."""
    running = network(path)
    shapes = {name: level.shape for name, level in graphs.named_maps(graphs.spec(model)).items()}

    def call(image: np.ndarray) -> Sequence[np.ndarray]:
        found = outputs(running, image, list(shapes))
        return [value.reshape(shape) for value, shape in zip(found, shapes.values(), strict=True)]

    return call
