"""Features to actions."""
