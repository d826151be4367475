"""Observations to features."""
