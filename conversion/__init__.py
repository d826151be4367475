"""Published checkpoints of other projects, read as they are and written as ours."""

from .published import load_published, published_layout, read_published

__all__ = ["load_published", "published_layout", "read_published"]
