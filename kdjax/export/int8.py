"""ONNX files in int8 of a model that was trained for it.

They have the trained scales, in QuantizeLinear and DequantizeLinear around what runtimes compute with bytes. The maps
come rounded from the network (`operators.quantise_p`). Here kernels become bytes, with a scale for each output
channel, and what only moves values keeps theirs: then onnxruntime computes convolutions, SiLUs, sums and concatenations
with bytes, because each of them stands between the two operators.

Reference: ONNX's operators QuantizeLinear and DequantizeLinear, https://onnx.ai/onnx/operators/; onnxruntime, Quantize
ONNX Models, https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html.
"""

import collections
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kdjax import nn

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# Operators whose outputs are values of their inputs.
_MOVES = ("MaxPool", "Resize", "Transpose", "Relu", "Concat")
ZERO = 128  # zero point of the bytes of kernels
_LAST = [0, 2, 3, 1]  # the transposition after a convolution


def to_bytes(graph: "ModelProto", *, signed: bool = False) -> None:
    """Turns the kernels of a graph into bytes and their scales, in place.

    Args:
      graph: of a model trained for int8, with batch norms folded and fake quantisation as the two operators.
      signed: whether kernels are -127 .. 127 instead of 1 .. 255 with 128 as their zero point. x86 CPUs without VNNI
        add two products of a map's byte and a kernel's byte with a sign in 16 bits, where large ones are cut off:
        onnxruntime then computes something else. OpenVINO takes convolutions with a zero point out of int8.
    """
    edited = _Graph(graph, signed)
    edited.move_biases()
    edited.rename()
    edited.carry()
    edited.quantise_kernels()
    edited.write()


class _Graph:
    """The nodes of a graph while they are changed."""

    def __init__(self, graph: "ModelProto", signed: bool) -> None:
        from onnx import numpy_helper

        self.signed = signed
        self.graph = graph
        self.nodes: list[NodeProto] = list(graph.graph.node)
        self.constants = {one.name: numpy_helper.to_array(one) for one in graph.graph.initializer}
        self.made: dict[tuple[bytes, str, tuple[int, ...]], str] = {}  # constants by content
        self.index()

    def index(self) -> None:
        """Finds who makes and who uses each value."""
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.users: dict[str, list[NodeProto]] = collections.defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.users[name].append(node)

    def constant(self, value: np.ndarray) -> str:
        """The name of a constant with this value; equal ones are one."""
        key = value.tobytes(), value.dtype.str, value.shape
        if key not in self.made:
            self.made[key] = f"int8_{len(self.made)}"
            self.constants[self.made[key]] = value
        return self.made[key]

    def node(self, kind: str, inputs: Sequence[str], output: str, **form: Any) -> "NodeProto":
        """A new node; it is added by who asks for it."""
        from onnx import helper

        return helper.make_node(kind, inputs, [output], name=f"{output}_{kind}", **form)

    def form(self, name: str) -> tuple[float, int] | None:
        """Scale and zero point of a value that is a byte's; None: it is not."""
        node = self.maker.get(name)
        if node is None or node.op_type != "DequantizeLinear" or node.input[1] not in self.constants:
            return None
        scale, zero = (self.constants[part] for part in node.input[1:3])
        return (float(scale), int(zero)) if scale.ndim == 0 and zero.dtype == np.uint8 else None

    def is_zero(self, name: str) -> bool:
        """Whether a value is the constant 0 as a float; indices are not touched."""
        value = self.constants.get(name)
        return value is not None and value.dtype == np.float32 and not value.any()

    def kind(self, name: str) -> str:
        """The operator that makes a value."""
        return self.maker[name].op_type if name in self.maker else ""

    def move_biases(self) -> None:
        """Conv, Transpose, Add of a bias and the two operators -> Conv with bias, the two operators, Transpose."""
        removed, added = [], []
        for node in self.nodes:
            bias = next((name for name in node.input if name in self.constants), "")
            turned = next((name for name in node.input if self.kind(name) == "Transpose"), "")
            if node.op_type != "Add" or not bias or not turned:
                continue
            turn = self.maker[turned]
            conv, users = self.maker.get(turn.input[0]), self.users[node.output[0]]
            if conv is None or conv.op_type != "Conv" or len(conv.input) > 2:
                continue
            if [user.op_type for user in users] != ["QuantizeLinear"]:
                continue
            [quantise] = users
            [dequantise] = self.users[quantise.output[0]]
            conv.input.append(self.constant(self.constants[bias].ravel()))
            quantise.input[0], result = conv.output[0], dequantise.output[0]
            dequantise.output[0] = f"{result}_first"
            removed += [node, turn]
            added.append(self.node("Transpose", [f"{result}_first"], result, perm=_LAST))
        gone = {node.output[0] for node in removed}
        self.nodes = [node for node in self.nodes if node.output[0] not in gone] + added
        self.index()

    def rename(self) -> None:
        """Means over a whole map, and ReLUs, in the form that onnxruntime computes with bytes."""
        for place, node in enumerate(self.nodes):
            zero = [name for name in node.input if self.is_zero(name)]
            if node.op_type == "Max" and len(zero) == 1 and len(node.input) == 2:
                [x] = set(node.input) - set(zero)
                self.nodes[place] = self.node("Relu", [x], node.output[0])
            if node.op_type == "ReduceMean" and self.constants[node.input[1]].tolist() == [2, 3]:
                self.nodes[place] = self.node("GlobalAveragePool", node.input[:1], node.output[0])
        self.index()

    def carry(self) -> None:
        """The two operators also after what moves values that are bytes, with the scale and zero point of these."""
        for node in self.sorted():
            forms = {self.form(name) for name in (node.input if node.op_type == "Concat" else node.input[:1])}
            result = node.output[0]
            done = all(user.op_type == "QuantizeLinear" for user in self.users[result])
            if node.op_type not in _MOVES or len(forms) != 1 or None in forms or done:
                continue
            _, scale, zero = self.maker[node.input[0]].input
            node.output[0] = f"{result}_moved"
            both = [
                self.node("QuantizeLinear", [f"{result}_moved", scale, zero], f"{result}_bytes"),
                self.node("DequantizeLinear", [f"{result}_bytes", scale, zero], result),
            ]
            self.nodes += both
            self.maker |= {f"{result}_moved": node, f"{result}_bytes": both[0], result: both[1]}
        self.index()

    def quantise_kernels(self) -> None:
        """Convolutions of bytes get kernels of bytes and biases of 32 bits."""
        for node in list(self.nodes):
            if node.op_type != "Conv" or (form := self.form(node.input[0])) is None:
                continue
            kernel = self.constants[node.input[1]]
            bias = self.constants[node.input[2]] if len(node.input) > 2 else np.zeros(len(kernel), np.float32)
            # A bias of 32 bits needs a larger scale where the kernel of a channel is nearly 0.
            least = np.abs(bias) / np.float32(2**30 * form[0])
            scale = np.maximum(nn.kernel_scale(np.moveaxis(kernel, 0, -1)), least).astype(np.float32)
            # The kernel is rounded, so that this finds the trained bytes, whatever was folded into it.
            whole = np.round(kernel / scale.reshape(-1, 1, 1, 1)).astype(np.int8)
            if not self.signed:
                whole = (whole.astype(np.int16) + ZERO).astype(np.uint8)
            of_bias = (np.float32(form[0]) * scale).astype(np.float32)
            units = np.round(bias.astype(np.float64) / of_bias).astype(np.int32)
            names = [self.bytes_of(whole, scale, node), self.bytes_of(units, of_bias, node)]
            node.input[:] = [node.input[0], *names]
        self.index()

    def bytes_of(self, values: np.ndarray, scale: np.ndarray, node: "NodeProto") -> str:
        """DequantizeLinear of constants, along the first axis."""
        name = f"{node.output[0]}_{values.dtype}"
        zeros = np.full(len(scale), ZERO if values.dtype == np.uint8 else 0, values.dtype)
        inputs = [self.constant(one) for one in (values, scale, zeros)]
        self.nodes.append(self.node("DequantizeLinear", inputs, name, axis=0))
        return name

    def sorted(self) -> "list[NodeProto]":
        """The nodes in an order in which each comes after those that make its inputs."""
        made = {name for node in self.nodes for name in node.output}
        found: list[NodeProto] = []
        waiting, known = list(self.nodes), set()
        while waiting:
            ready = [node for node in waiting if all(name in known or name not in made for name in node.input)]
            found += ready
            known |= {name for node in ready for name in node.output}
            waiting = [node for node in waiting if not set(node.output) <= known]
        return found

    def write(self) -> None:
        """Puts the nodes and the constants that they use into the graph."""
        from onnx import numpy_helper

        nodes = [type(node).FromString(node.SerializeToString()) for node in self.sorted()]
        used = {name for node in nodes for name in node.input}
        constants = [numpy_helper.from_array(self.constants[name], name) for name in self.constants if name in used]
        graph = self.graph.graph
        for entries in (graph.node, graph.initializer, graph.value_info):
            del entries[:]
        graph.node.extend(nodes)
        graph.initializer.extend(constants)
