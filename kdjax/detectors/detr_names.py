"""Names of detection transformers in other projects' state dicts, changed to kdjax's own.

Read are transformers 5.24 (`state_dict()` and what `save_pretrained` writes, which differ) and the authors' RT-DETR and
D-FINE. kdjax's own names follow transformers', with the authors' `conv` for convolutions and `bn` for their norms.
"""

import re

import numpy as np

from kdjax.detectors.api import State

# What files hold beside the weights: constants of the architecture.
_UNUSED = re.compile(r"(?:num_points_scale|n_points_scale|(?:^|\.)anchors|valid_mask)$")
# Transformers' names without the leading `model.`.
_TRANSFORMERS = (
    (r"^backbone\.model\.embedder\.embedder\.", "backbone.embedder."),
    (r"^backbone\.model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"backbone.stages.\1.\2."),
    (r"^backbone\.model\.(?:encoder\.)?", "backbone."),
    (r"\.shortcut\.1\.", ".shortcut."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".bn."),
    (r"\.lab\.", ".activation."),
    (r"^encoder_input_proj\.(\d)\.0\.", r"encoder.input_proj.\1.conv."),
    (r"^encoder_input_proj\.(\d)\.1\.", r"encoder.input_proj.\1.bn."),
    (r"^decoder_input_proj\.(\d)\.0\.", r"decoder_input_proj.\1.conv."),
    (r"^decoder_input_proj\.(\d)\.1\.", r"decoder_input_proj.\1.bn."),
    (r"^encoder\.(?:aifi|encoder)\.0\.layers\.0\.", "encoder.aifi."),
    (r"^(encoder\.(?!aifi).*)\.norm\.", r"\1.bn."),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.fc", ".fc"),
    (r"\.mlp\.layers\.0\.", ".fc1."),
    (r"\.mlp\.layers\.1\.", ".fc2."),
    (r"^(enc_\w+|denoising_class_embed)\.", r"decoder.\1."),
    (r"^decoder\.(class_embed|bbox_embed|pre_bbox_head|lqe_layers)\.", r"decoder.heads.\1."),
)
_AUTHORS = (
    (r"^backbone\.conv1\.conv1_1\.", "backbone.embedder.0."),
    (r"^backbone\.conv1\.conv1_2\.", "backbone.embedder.1."),
    (r"^backbone\.conv1\.conv1_3\.", "backbone.embedder.2."),
    (r"^backbone\.res_layers\.(\d+)\.blocks\.(\d+)\.", r"backbone.stages.\1.\2."),
    (r"^backbone\.stem\.", "backbone.embedder."),
    (r"\.lab\.", ".activation."),
    (r"\.branch2a\.", ".layer.0."),
    (r"\.branch2b\.", ".layer.1."),
    (r"\.branch2c\.", ".layer.2."),
    (r"\.short\.(?:conv\.)?(conv|norm)\.", r".shortcut.\1."),
    (r"^encoder\.encoder\.0\.layers\.0\.norm2\.", "encoder.aifi.final_layer_norm."),
    (r"^encoder\.encoder\.0\.layers\.0\.", "encoder.aifi."),
    (r"^encoder\.input_proj\.(\d)\.0\.", r"encoder.input_proj.\1.conv."),
    (r"^encoder\.input_proj\.(\d)\.1\.", r"encoder.input_proj.\1.bn."),
    (r"^(encoder\.\w+_blocks\.\d+)\.cv([14])\.", r"\1.conv\2."),
    (r"^(encoder\.\w+_blocks\.\d+)\.cv([23])\.1\.", r"\1.conv\2."),
    (r"^(encoder\.\w+_blocks\.\d+)\.cv2\.0\.", r"\1.csp_rep1."),
    (r"^(encoder\.\w+_blocks\.\d+)\.cv3\.0\.", r"\1.csp_rep2."),
    (r"^(encoder\.downsample_convs\.\d+)\.0\.cv", r"\1.conv"),
    (r"^decoder\.input_proj\.", "decoder_input_proj."),
    (r"^decoder\.enc_output\.proj\.", "decoder.enc_output.0."),
    (r"^decoder\.enc_output\.norm\.", "decoder.enc_output.1."),
    (r"^decoder\.decoder\.", "decoder."),
    (r"^decoder\.(pre_bbox_head|lqe_layers)\.", r"decoder.heads.\1."),
    (r"^decoder\.dec_score_head\.", "decoder.heads.class_embed."),
    (r"^decoder\.dec_bbox_head\.", "decoder.heads.bbox_embed."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"\.linear1\.", ".fc1."),
    (r"\.linear2\.", ".fc2."),
    (r"\.norm1\.", ".self_attn_layer_norm."),
    (r"\.norm2\.", ".encoder_attn_layer_norm."),
    (r"\.norm3\.", ".final_layer_norm."),
    (r"^((?:backbone|encoder\.(?!aifi)|decoder_input_proj).*)\.norm\.", r"\1.bn."),
)


def renamed(state: State) -> State:
    """The state dict of another project under kdjax's names; one with kdjax's own names is returned unchanged.

    Where transformers' heads are stored twice, the second ones are left out if they are the same.

    Example:
      >>> list(renamed({"encoder_input_proj.0.0.weight": 0, "decoder.layers.0.self_attn.o_proj.bias": 0}))
      ['encoder.input_proj.0.conv.weight', 'decoder.layers.0.self_attn.out_proj.bias']
      >>> list(renamed({"decoder.decoder.layers.0.norm3.weight": 0, "decoder.anchors": 0}))
      ['decoder.layers.0.final_layer_norm.weight']
    """
    if any(name.startswith(("encoder_input_proj.", "backbone.model.")) for name in state):
        rules, state = _TRANSFORMERS, _heads_once(state)
    elif any(name.startswith("decoder.decoder.") for name in state):
        rules, state = _AUTHORS, _projections_apart(state)
    else:
        return state
    found = {}
    for name, value in state.items():
        if _UNUSED.search(name):
            continue
        for old, new in rules:
            name = re.sub(old, new, name)
        found[name] = value
    return found


def _heads_once(state: State) -> State:
    """Heads that stand beside the decoder, put into it."""
    moved = {}
    for name, value in state.items():
        inner = f"decoder.{name}" if name.startswith(("class_embed.", "bbox_embed.")) else name
        same = inner != name and inner in state
        if same and not np.array_equal(state[inner], value):
            moved[name] = value  # it is reported as one that matches nothing
        elif not same:
            moved[inner] = value
    return moved


def _projections_apart(state: State) -> State:
    """PyTorch's one matrix of the three projections of an attention, as three."""
    apart = {}
    for name, value in state.items():
        stem, mark, leaf = name.rpartition("in_proj_")
        if not mark:
            apart[name] = value
            continue
        for part, rows in zip("qkv", np.split(np.asarray(value), 3), strict=True):
            apart[f"{stem}{part}_proj.{leaf}"] = rows
    return apart
