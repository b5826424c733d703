"""Detections to figures, tables and pictures."""
