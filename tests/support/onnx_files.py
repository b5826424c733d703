"""Small ONNX files, made by onnx's helper."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def write(
    path: Path,
    nodes: Sequence[tuple],
    *,
    image: Sequence[int | str],
    outputs: Mapping[str, Sequence[int | str]],
    constants: Mapping[str, np.ndarray] | None = None,
    dtype: type = np.float32,
    sizes: type | None = None,
    facts: Mapping[str, str] | None = None,
    labels: Sequence[str] = (),
) -> Path:
    """Writes a graph.

    Args:
      path: the file.
      nodes: (operator, inputs, outputs, attributes); the image is "image", sizes are "sizes".
      image: shape of the input; text is an axis of any length.
      outputs: their shapes by name.
      constants: by name.
      dtype: of the image.
      sizes: the type of a second input [B, 2], if there is one.
      facts: metadata.
      labels: outputs of int64; the others are float32.
    """
    import onnx
    from onnx import helper, numpy_helper

    def kind(of) -> int:
        return helper.np_dtype_to_tensor_dtype(np.dtype(of))

    inputs = [helper.make_tensor_value_info("image", kind(dtype), image)]
    if sizes is not None:
        inputs.append(helper.make_tensor_value_info("sizes", kind(sizes), [image[0], 2]))
    graph = helper.make_graph(
        [helper.make_node(op, i, o, **rest) for op, i, o, rest in nodes],
        "small",
        inputs,
        [
            helper.make_tensor_value_info(n, kind(np.int64 if n in labels else np.float32), s)
            for n, s in outputs.items()
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    helper.set_model_props(model, dict(facts or {}))
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def backbone(path: Path, *, batch: int | str = "B", side: int | str = 64, channels: int = 5, stride: int = 16) -> Path:
    """A convolution with random weights over patches: the map "features" [B, channels, H / stride, W / stride]."""
    kernel = np.random.default_rng(0).normal(0, 0.05, (channels, 3, stride, stride)).astype(np.float32)
    nodes = [
        ("Conv", ["image", "kernel"], ["patches"], {"strides": [stride, stride]}),
        ("Tanh", ["patches"], ["features"], {}),
    ]
    cells = side // stride if isinstance(side, int) else "h"
    shape = [batch, channels, cells, cells if isinstance(side, int) else "w"]
    image = [batch, 3, side, side if isinstance(side, int) else "width"]
    return write(path, nodes, image=image, outputs={"features": shape}, constants={"kernel": kernel})


def constant(
    path: Path,
    values: Mapping[str, np.ndarray],
    *,
    image: Sequence[int | str],
    facts: Mapping[str, str] | None = None,
    dtype: type = np.float32,
    sizes: type | None = None,
) -> Path:
    """Outputs of given values for one image, whatever the image; an axis of images in front is repeated for a batch."""
    nodes, constants = [("Shape", ["image"], ["batch"], {"start": 0, "end": 1})], {}
    for name, value in values.items():
        constants |= {f"{name}_value": value, f"{name}_rest": np.ones(value.ndim - 1, np.int64)}
        nodes += [
            ("Concat", ["batch", f"{name}_rest"], [f"{name}_shape"], {"axis": 0}),
            ("Expand", [f"{name}_value", f"{name}_shape"], [name], {}),
        ]
    shapes = {name: [image[0], *value.shape[1:]] for name, value in values.items()}
    labels = [name for name, value in values.items() if value.dtype == np.int64]
    return write(
        path,
        nodes,
        image=image,
        outputs=shapes,
        constants=constants,
        facts=facts,
        labels=labels,
        dtype=dtype,
        sizes=sizes,
    )
