import gc
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from manipulators.data.streaming.file_cache import FileCache
from manipulators.errors import InvalidConfigError, ReadOnlyError


def of_size(size, made=None):
    def make(path):
        if made is not None:
            made.append(size)
        path.write_bytes(bytes(size))

    return make


def names(cache):
    return sorted(path.name for path in cache.folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def test_what_was_not_used_for_longest_leaves(tmp_path):
    cache, made = FileCache(tmp_path, 300e-9), []
    for name in ("a/1", "a/2", "b/3"):
        assert cache.get(name, of_size(100, made)).stat().st_size == 100
        time.sleep(0.01)
    cache.get("a/1", of_size(100, made))
    assert made == [100] * 3 and cache.size() == 300
    cache.get("b/4", of_size(150, made))
    assert [path for path in ("a/1", "a/2", "b/3", "b/4") if (cache.folder / path).is_file()] == ["a/1", "b/4"]
    with pytest.raises(InvalidConfigError, match=r"cache_gb=3e-07 .* c takes, 3\.01e-07 GB.*--data\.cache_gb"):
        cache.get("c", of_size(301))
    assert cache.size() == 250


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    def fail(path):
        path.write_bytes(bytes(10))
        raise KeyboardInterrupt

    cache = FileCache(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        cache.get("a", fail)
    assert cache.size() == 0 and not list(tmp_path.glob("**/*part"))


def test_two_who_want_one_file_make_it_once(tmp_path):
    cache, made = FileCache(tmp_path, 1), []

    def slow(path):
        time.sleep(0.1)
        of_size(10, made)(path)

    threads = [threading.Thread(target=cache.get, args=("a", slow)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [10]


def test_temporary_folders_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, sys, tempfile\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "from pathlib import Path\n"
        "from manipulators.data.streaming.file_cache import FileCache\n"
        "cache = FileCache(None, 1); cache.get('a', lambda path: path.write_bytes(b'a'))\n"
        "if os.fork() == 0: del cache; sys.exit()\n"  # a worker's copy removes nothing
        "os.wait(); assert cache.get('a', None).is_file()\n"
        "if sys.argv[1] == 'killed': os.kill(os.getpid(), 9)\n"
    )
    for end, left in (("ended", 0), ("killed", 1)):
        subprocess.run([sys.executable, "-c", code, end], check=end == "ended")
        assert len(list(tmp_path.iterdir())) == left
    cache = FileCache(None, 1)
    assert list(tmp_path.iterdir()) == [cache.folder]  # the killed program's is gone
    FileCache(None, 1)
    assert cache.folder.is_dir()
    del cache
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReadOnlyError, match="cache_folder"):
        FileCache(Path(tmp_path / "file"), 1).get("a", of_size(1))


def test_files_made_at_the_same_time_fit_together(tmp_path, monkeypatch):
    cache, replace = FileCache(tmp_path, 250e-9), os.replace

    def slowly(*paths):
        time.sleep(0.05)
        replace(*paths)

    monkeypatch.setattr("manipulators.data.streaming.file_cache.os.replace", slowly)
    threads = [threading.Thread(target=cache.get, args=(name, of_size(100))) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.size() == 200
