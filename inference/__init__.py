"""Observation in, action out: pipeline, action queue, temporal ensembling."""
