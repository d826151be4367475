"""What a training saves, and goes on from."""
