"""Losses as pure functions of arrays: `kdjax.losses.channel_kl(student, teacher)`.

A loss returns float32 arrays that are not reduced further than its formula requires. Weights, masks and means are up to
the caller. The files are named by what they compute; each method's file in `kdjax/methods` combines some of them.
"""

from kdjax.losses.attention import (
    attention_difference,
    attention_weighted,
    channel_attention,
    joint_spatial_attention,
    spatial_attention,
)
from kdjax.losses.box import ciou, diou, distribution_focal, fine_grained_localization, giou, iou
from kdjax.losses.classification import (
    binary_cross_entropy,
    cross_entropy,
    label_score,
    matchability_aware,
    modulated_bce,
    quality_focal,
    sigmoid_focal,
    soft_binary_cross_entropy,
    varifocal,
)
from kdjax.losses.disagreement import class_disagreement, general_instances, score_gap
from kdjax.losses.distance import (
    adaptive_avg_pool,
    cosine,
    frobenius,
    guided_squared,
    l1,
    multiscale,
    pearson,
    smooth_l1,
    squared,
)
from kdjax.losses.divergence import (
    channel_kl,
    decoupled_kl,
    decoupled_sigmoid_kl,
    has_positives,
    rank_kl,
    sigmoid_kl,
    softmax_kl,
)
from kdjax.losses.frequency import apply_frequency_mask, frequency_mask, frequency_masked
from kdjax.losses.mask import dice, mask_cross_entropy
from kdjax.losses.normalization import match_statistics, min_max, standardize, unit_mean, unit_norm
from kdjax.losses.reconstruction import keep_mask, reconstruct
from kdjax.losses.regions import fine_grained_mask, focal_masks, level_masks, valuable_region
from kdjax.losses.relation import context_block, init_context, init_non_local, non_local_block, pairwise_relation
from kdjax.losses.similarity import fitting_window, ssim, structural_dissimilarity

__all__ = [
    "adaptive_avg_pool",
    "apply_frequency_mask",
    "attention_difference",
    "attention_weighted",
    "binary_cross_entropy",
    "channel_attention",
    "channel_kl",
    "ciou",
    "class_disagreement",
    "context_block",
    "cosine",
    "cross_entropy",
    "decoupled_kl",
    "decoupled_sigmoid_kl",
    "dice",
    "diou",
    "distribution_focal",
    "fine_grained_localization",
    "fine_grained_mask",
    "fitting_window",
    "focal_masks",
    "frequency_mask",
    "frequency_masked",
    "frobenius",
    "general_instances",
    "giou",
    "guided_squared",
    "has_positives",
    "init_context",
    "init_non_local",
    "iou",
    "joint_spatial_attention",
    "keep_mask",
    "l1",
    "label_score",
    "level_masks",
    "mask_cross_entropy",
    "match_statistics",
    "matchability_aware",
    "min_max",
    "modulated_bce",
    "multiscale",
    "non_local_block",
    "pairwise_relation",
    "pearson",
    "quality_focal",
    "rank_kl",
    "reconstruct",
    "score_gap",
    "sigmoid_focal",
    "sigmoid_kl",
    "smooth_l1",
    "soft_binary_cross_entropy",
    "softmax_kl",
    "spatial_attention",
    "squared",
    "ssim",
    "standardize",
    "structural_dissimilarity",
    "unit_mean",
    "unit_norm",
    "valuable_region",
    "varifocal",
]
