"""Detections to metrics, tables and images."""
