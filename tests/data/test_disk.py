import pytest

from manipulators.data.disk import mount_point, naming_a_full_disk
from manipulators.errors import DiskFullError, RecordingError, VideoError


@pytest.mark.parametrize("number", [28, 122])
def test_the_cause_counts(tmp_path, number):
    named = rf"mounted at {mount_point(tmp_path)} is full"
    with pytest.raises(DiskFullError, match=named), naming_a_full_disk(tmp_path):
        try:
            raise OSError(number, "no space")
        except OSError as error:
            raise VideoError("d.mp4 cannot be encoded") from error
    assert issubclass(DiskFullError, RecordingError)


def test_other_errors_pass(tmp_path):
    with pytest.raises(VideoError), naming_a_full_disk(tmp_path):
        raise VideoError("d.mp4 cannot be encoded")


def test_folders_need_not_exist(tmp_path):
    assert mount_point(tmp_path / "a/b") == mount_point(tmp_path)
