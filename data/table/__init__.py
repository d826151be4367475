"""Rows of data files, memory-mapped."""
