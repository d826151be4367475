"""One file per layout in which another project publishes whole checkpoints; importing it registers the layout."""
