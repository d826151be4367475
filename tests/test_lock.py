"""One run at a time in a folder: the second is refused by name, and a lock ends with its process."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from manipulators._lock import OutputLock, locked
from manipulators.errors import FolderInUseError

HOLD = """
import os, sys, time
from manipulators._lock import OutputLock
lock = OutputLock(sys.argv[1], "a training")
child = os.fork() if sys.argv[2] == "fork" else None
if child != 0:
    print(child or "ready", flush=True)
time.sleep(60)
"""


def hold(path, mode="alone"):
    """Start a process that holds the lock; return it and the first line it prints."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), mode], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_second_run_is_refused_by_name_until_the_first_is_killed(tmp_path):
    target = tmp_path / "made" / "demos"
    process, _ = hold(target)
    try:
        assert names(tmp_path / "made") == [".demos.lock"]
        message = rf"demos is in use by a training \(process {process.pid} on this computer since 2.*kill -INT"
        with pytest.raises(FolderInUseError, match=message) as caught:
            OutputLock(target, "a recording")
        assert caught.value.holder["purpose"] == "a training"
    finally:
        process.kill()
        process.wait()
    assert names(tmp_path / "made") == [".demos.lock"]  # what a killed process leaves
    with locked(target, "a recording"):
        assert json.loads((tmp_path / "made" / ".demos.lock").read_text())["pid"] == os.getpid()
    assert names(tmp_path / "made") == []


def test_a_process_that_ends_by_itself_leaves_nothing(tmp_path):
    code = HOLD.replace("time.sleep(60)", "raise KeyboardInterrupt")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "demos"), "alone"], capture_output=True)
    assert done.stdout == b"ready\n" and names(tmp_path) == []


def test_a_fork_that_outlives_its_parent_does_not_hold_the_lock(tmp_path):
    process, child = hold(tmp_path / "demos", "fork")
    try:
        process.kill()
        process.wait()
        os.kill(int(child), 0)  # it runs
        with locked(tmp_path / "demos", "a recording"):
            pass
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_a_fork_neither_removes_the_lock_nor_takes_it(tmp_path):
    lock = OutputLock(tmp_path / "demos", "a training")
    told = multiprocessing.get_context("fork").Queue()

    def work():
        lock.release()
        try:
            OutputLock(tmp_path / "demos", "a worker")
        except FolderInUseError as error:
            told.put(str(error))

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    assert f"process {os.getpid()} on this computer" in told.get(timeout=30)
    worker.join()
    assert names(tmp_path) == [".demos.lock"]
    process = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path / "demos"), "alone"], capture_output=True)
    assert b"in use by a training" in process.stderr  # the worker gave up nothing
    lock.release()
    assert names(tmp_path) == []


def test_the_same_process_is_refused_too_until_the_first_is_forgotten(tmp_path):
    lock = OutputLock(tmp_path / "demos", "a recording")
    for _ in range(2):  # looking does not give up the lock
        with pytest.raises(FolderInUseError, match=r"in use by a recording .in this process itself.*Close the first"):
            OutputLock(tmp_path / "made" / ".." / "demos", "a recording")
    process = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path / "demos"), "alone"], capture_output=True)
    assert b"FolderInUseError" in process.stderr
    del lock
    OutputLock(tmp_path / "demos", "a recording").release()
    assert names(tmp_path) == []


def test_a_lock_of_another_computer_says_how_to_remove_it(tmp_path):
    file = tmp_path / ".demos.lock"
    file.write_text(json.dumps({"purpose": "a training", "pid": 7, "host": "node12", "since": "2026-01-01"}))
    with pytest.raises(FolderInUseError, match=r"process 7 on the computer 'node12'.*rm .*\.demos\.lock"):
        OutputLock(tmp_path / "demos", "a recording")
    assert file.exists()
    file.unlink()
    OutputLock(tmp_path / "demos", "a recording").release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_a_lock_that_says_nothing_and_is_not_held_is_taken_over(tmp_path, content):
    (tmp_path / ".demos.lock").write_text(content)
    began = time.monotonic()
    OutputLock(tmp_path / "demos", "a recording").release()
    assert time.monotonic() - began < 0.1
    assert names(tmp_path) == []


def test_without_locks_of_the_file_system_the_process_decides(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    done = subprocess.Popen(["true"])
    done.wait()
    holder = {"purpose": "a training", "host": os.uname().nodename}
    (tmp_path / ".demos.lock").write_text(json.dumps(holder | {"pid": done.pid}))
    OutputLock(tmp_path / "demos", "a recording").release()
    (tmp_path / ".demos.lock").write_text(json.dumps(holder | {"pid": os.getppid()}))
    with pytest.raises(FolderInUseError):
        OutputLock(tmp_path / "demos", "a recording")
