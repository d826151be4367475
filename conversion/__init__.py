"""Published checkpoints of other projects, read as they are and written as ours."""
