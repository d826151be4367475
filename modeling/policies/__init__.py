"""Backbone and action head, joined into a policy."""
