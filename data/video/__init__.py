"""Video files: random access to frames, an encoder, files that many episodes share, decoded frames on disk."""
