"""What TensorRT's reader of ONNX files takes; TensorRT itself is run by no test.

Source: docs/operators.md of onnx/onnx-tensorrt at its release 10.1 (commit 96e7811, June 2024), the operators with "Y";
and the limits that it names for operators that kdjax writes.
"""

import numpy as np

OPSETS = range(9, 21)
OPERATORS = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike Ceil Celu
    Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace DequantizeLinear Div
    Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm
    GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid
    HardSwish Hardmax Identity If ImageScaler InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu
    Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min
    Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad ParametricSoftplus Pow QuantizeLinear RNN
    RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
    ReverseSequence RoiAlign Round ScaledTanh Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin
    Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK
    Transpose Trilu Unsqueeze Upsample Where Xor
    """.split()
)
TOP_K = 3840  # its K must be less
RESIZE = {"half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"}
SAMPLED = (1, 10)  # types of onnx.TensorProto, float and half, of NonMaxSuppression, NonZero, RoiAlign and GridSample


def complaints(file) -> list[str]:
    """What TensorRT would not take of an ONNX file."""
    import onnx

    model = onnx.load(str(file))
    graph = onnx.shape_inference.infer_shapes(model).graph
    found = [f"opset {one.version}" for one in model.opset_import if one.domain == "" and one.version not in OPSETS]
    values = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    types = {entry.name: entry.type.tensor_type.elem_type for entry in (*graph.value_info, *graph.input)}
    types |= {entry.name: entry.data_type for entry in graph.initializer}
    for node in graph.node:
        form = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        if node.domain or node.op_type not in OPERATORS:
            found.append(f"{node.domain} {node.op_type}".strip())
        elif node.op_type in ("NonMaxSuppression", "NonZero", "RoiAlign", "GridSample"):
            if types[node.input[0]] not in SAMPLED:
                found.append(f"{node.op_type} of type {types[node.input[0]]}")
        elif node.op_type == "TopK" and np.max(values.get(node.input[1], 0)) >= TOP_K:
            found.append(f"TopK of {values[node.input[1]]}")
        elif node.op_type == "Resize":
            if form.get("coordinate_transformation_mode", b"half_pixel").decode() not in RESIZE:
                found.append(f"Resize {form}")
        elif node.op_type in ("Squeeze", "Pad", "ReduceMean", "Slice"):
            axes = {"Squeeze": 1, "Pad": 3, "ReduceMean": 1, "Slice": 3}[node.op_type]
            if len(node.input) > axes and node.input[axes] not in values:
                found.append(f"{node.op_type} along axes that are computed")
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            if np.any(values[node.input[2]]):
                found.append(f"{node.op_type} with a zero point")
    return sorted(set(found))
