"""Geometry of boxes as pure functions: overlap, coders, priors, assigners, matching, NMS and RoIAlign.

Boxes are `x1 y1 x2 y2` in pixels of the network input, unless a function says that they are `cx cy w h`.
"""

from kdjax.boxes.assign import atss, atss_candidates, inside_padding, max_iou, smallest_box
from kdjax.boxes.coding import (
    boxes_to_cells,
    boxes_to_deltas,
    boxes_to_distance,
    cells_to_boxes,
    centreness,
    deltas_to_boxes,
    distance_to_boxes,
    expected_distance,
)
from kdjax.boxes.convert import clip, from_cxcywh, from_xywh, to_cxcywh, to_xywh
from kdjax.boxes.dynamic import dynamic_soft_label, mask_centers, sim_ota
from kdjax.boxes.edges import edge_bins, edge_distance, edges_to_boxes, expected_edges, nearest_bins
from kdjax.boxes.iou import box_iou, pairwise_iou
from kdjax.boxes.matching import hungarian, matching_cost, objects_of
from kdjax.boxes.nms import best_pairs, greedy_nms, select_detections, select_rows
from kdjax.boxes.priors import grid_anchors, grid_priors, octave_scales
from kdjax.boxes.roi import crop_masks, roi_align, roi_levels
from kdjax.boxes.topk import k_smallest

__all__ = [
    "atss",
    "atss_candidates",
    "best_pairs",
    "box_iou",
    "boxes_to_cells",
    "boxes_to_deltas",
    "boxes_to_distance",
    "cells_to_boxes",
    "centreness",
    "clip",
    "crop_masks",
    "deltas_to_boxes",
    "distance_to_boxes",
    "dynamic_soft_label",
    "edge_bins",
    "edge_distance",
    "edges_to_boxes",
    "expected_distance",
    "expected_edges",
    "from_cxcywh",
    "from_xywh",
    "greedy_nms",
    "grid_anchors",
    "grid_priors",
    "hungarian",
    "inside_padding",
    "k_smallest",
    "mask_centers",
    "matching_cost",
    "max_iou",
    "nearest_bins",
    "objects_of",
    "octave_scales",
    "pairwise_iou",
    "roi_align",
    "roi_levels",
    "select_detections",
    "select_rows",
    "sim_ota",
    "smallest_box",
    "to_cxcywh",
    "to_xywh",
]
