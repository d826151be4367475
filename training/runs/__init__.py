"""Runs of recipes, from demonstrations to a published policy."""
