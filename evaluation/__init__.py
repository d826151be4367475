"""Closed-loop evaluation: environments, demonstrations, rollouts."""
