"""A recording: its frames, checked, the episodes that are finished, and the data files they go to."""
