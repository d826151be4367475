"""Training recipes: short YAML files, shipped in the wheel."""
