import numpy as np
import pytest

from manipulators.data.video.encoder import VideoEncoder
from manipulators.errors import VideoError


def test_frames_that_cannot_be_encoded(tmp_path):
    with pytest.raises(VideoError, match="'h264'"):
        VideoEncoder(tmp_path / "a.mp4", fps=10, codec="h265")
    with VideoEncoder(tmp_path / "b.mp4", fps=10) as encoder, pytest.raises(VideoError, match="63×64"):
        encoder.add(np.zeros((63, 64, 3), dtype=np.uint8))
    with VideoEncoder(tmp_path / "c.mp4", fps=10) as encoder:
        encoder.add(np.zeros((64, 64, 3), dtype=np.uint8))
        with pytest.raises(VideoError, match="one of"):
            encoder.add(np.zeros((64, 32, 3), dtype=np.uint8))
