"""Datasets that are too large to be downloaded, read as streams."""
