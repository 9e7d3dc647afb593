"""Shelf of statistics of activations: one file and one class each, gathered by `core/statistic.py`."""
