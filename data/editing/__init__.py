"""Datasets made of others: merged, split, selected, with other instructions or statistics; no video is encoded."""
