"""Metrics, one file each: a pure function, and an `evaluate.Metric` around it where others may load it."""
