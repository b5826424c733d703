"""The names and the layout of PyTorch state dicts."""

import numpy as np

from kdjax.detectors import build
from kdjax.weights import torch_names


def test_names_are_mmdetections(detector, state):
    assert state["backbone.stem.0.conv.weight"].shape == (4, 3, 3, 3)
    assert state["backbone.stage1.1.blocks.0.conv2.depthwise_conv.conv.weight"].shape == (8, 1, 5, 5)
    assert state["bbox_head.rtm_cls.2.bias"].shape == (3,)
    assert state["neck.out_convs.1.bn.num_batches_tracked"] == 0
    # One array that the levels share has a name for each of them.
    names = torch_names.table(detector)["params/bbox_head/reg_convs/0/1/conv/kernel"]
    assert names == [f"bbox_head.reg_convs.{level}.1.conv.weight" for level in range(3)]
    apart = torch_names.table(build("rtmdet_pico", 3, share_conv=False))
    assert all(len(names) == 1 for names in apart.values())


def test_layout_is_oihw(variables, state):
    kernel = variables[0]["backbone"]["stem"]["0"]["conv"]["kernel"]
    np.testing.assert_array_equal(state["backbone.stem.0.conv.weight"][1, 2], kernel[:, :, 2, 1])
