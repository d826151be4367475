"""An episode while it is recorded: its frames, checked, and the data file they go to."""
