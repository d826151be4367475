"""The folders and files of each version of the LeRobot format: what `meta/` says, read and written."""
