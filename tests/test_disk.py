"""Errors of a disk name the disk, what was written, and the way out."""

import errno

import pytest

from manipulators._disk import mount_point, naming_disk_errors
from manipulators.errors import DiskError, DiskFullError, ReadOnlyError, RecordingError, VideoError


@pytest.mark.parametrize(
    ("number", "expected", "message"),
    [
        (errno.ENOSPC, DiskFullError, "is full with .* could not be written. 3 are kept. Free space there"),
        (errno.EDQUOT, DiskFullError, "is full"),
        (errno.EROFS, ReadOnlyError, "is read-only: .* Choose a folder on another disk"),
        (errno.EACCES, ReadOnlyError, "may not be written: Permission denied.*ls -ld"),
        (errno.EFBIG, DiskError, "ulimit -f"),
        (errno.EIO, DiskError, "failed .Input/output error"),
    ],
)
def test_an_error_of_the_disk_names_it(tmp_path, number, expected, message):
    with pytest.raises(expected, match=message) as caught, naming_disk_errors(tmp_path / "demos", "3 are kept."):
        try:
            raise OSError(number, "some words")
        except OSError as error:
            raise VideoError("d.mp4 cannot be encoded") from error  # what a library makes of it
    assert str(tmp_path / "demos") in str(caught.value)
    assert number in (errno.EACCES, errno.EFBIG) or str(mount_point(tmp_path)) in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("I/O error: No space left on device (os error 28)"), OSError("Not enough disk space. Needed: 9")],
)
def test_libraries_report_it_as_text(tmp_path, error):
    message = r"Free space there, or choose another cache"
    with pytest.raises(DiskFullError, match=message), naming_disk_errors(tmp_path, remedy="another cache"):
        raise error


def test_other_errors_and_other_places_pass(tmp_path):
    with pytest.raises(VideoError), naming_disk_errors(tmp_path):
        raise VideoError("d.mp4 cannot be encoded")
    with pytest.raises(PermissionError) as caught, naming_disk_errors(tmp_path / "output"):
        raise PermissionError(errno.EACCES, "denied", "/elsewhere/source")
    assert type(caught.value) is PermissionError
    with pytest.raises(DiskFullError, match="/elsewhere/cache could not"), naming_disk_errors(tmp_path / "output"):
        raise OSError(errno.ENOSPC, "full", "/elsewhere/cache")


def test_errors_whose_causes_go_in_a_circle_pass(tmp_path):
    """transformers raises errors that it has caught itself."""
    first, second = ValueError("first"), TypeError("second")
    first.__cause__, second.__cause__ = second, first
    with pytest.raises(ValueError, match="first"), naming_disk_errors(tmp_path):
        raise first


def test_a_named_error_stays_as_it_is(tmp_path):
    with (
        pytest.raises(DiskFullError, match="inner could not"),
        naming_disk_errors(tmp_path / "outer"),
        naming_disk_errors(tmp_path / "inner"),
    ):
        raise OSError(errno.ENOSPC, "full")
    assert issubclass(DiskFullError, RecordingError)


def test_folders_need_not_exist(tmp_path):
    assert mount_point(tmp_path / "a/b") == mount_point(tmp_path)
