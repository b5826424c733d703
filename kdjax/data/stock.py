"""Prepared stock TFDS directories with the feature spec of `coco/2017`."""
