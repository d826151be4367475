"""Blocks that several policies share."""
