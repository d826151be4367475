import errno
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError

from manipulators.data import source
from manipulators.errors import DatasetNotFoundError


def answered(kind, status):
    return kind("no", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    "errors, tries",
    [
        ([ConnectionError("reset"), answered(HfHubHTTPError, 503), answered(HfHubHTTPError, 429)], 4),
        ([ConnectionError("reset")] * 4, 4),
        ([answered(RemoteEntryNotFoundError, 404)], 1),
        ([answered(HfHubHTTPError, 401)], 1),
        ([OSError(errno.EIO, "the disk here")], 1),
    ],
)
def test_a_network_that_fails_is_tried_again(tmp_path, monkeypatch, caplog, errors, tries):
    calls, waits, left = [], [], list(errors)

    def download(repository, path, *, repo_type, revision, local_dir):
        calls.append((repository, path, repo_type, revision))
        if left:
            raise left.pop(0)
        local_dir.mkdir(parents=True)
        (local_dir / "file").write_text("data")
        return str(local_dir / "file")

    monkeypatch.setattr(source.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(source, "hf_hub_download", download)
    monkeypatch.setattr(source.time, "sleep", waits.append)
    arguments = ("hf://datasets/org/name@v3.0", "0123", "data/file", tmp_path / "target")
    if len(errors) == 3:
        source.download_file(*arguments)
        assert [path.name for path in tmp_path.iterdir()] == ["target"]
        assert caplog.text.count("is downloaded again in") == 3
    else:
        with pytest.raises(DatasetNotFoundError, match=r"'org/name' is neither .*hf auth login"):
            source.download_file(*arguments)
        assert list(tmp_path.iterdir()) == []
    assert calls == [("org/name", "data/file", "dataset", "0123")] * tries
    assert waits == [1, 4, 16][: tries - 1]
