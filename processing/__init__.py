"""Robot units to tensors and back: normalization, images, padding."""
