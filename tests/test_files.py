"""Files and folders that appear whole or not at all."""

import pytest

from manipulators._files import new_file, new_folder, refuse_existing, replace_files, write_text
from manipulators.errors import DiskFullError, FolderInUseError, OutputExistsError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_appears_at_the_end(tmp_path):
    target = tmp_path / "made" / "here"
    with new_folder(target) as folder:
        (folder / "a.txt").write_text("a")
        assert not target.exists()
        assert folder.parent == target.parent  # a rename within one file system
    assert names(tmp_path / "made") == ["here"]
    assert (target / "a.txt").read_text() == "a"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_folder_vanishes(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "made") as folder:
        (folder / "a.txt").write_text("a")
        raise error
    assert names(tmp_path) == []


def test_a_folder_left_by_a_killed_run_is_replaced(tmp_path):
    (tmp_path / "made.incomplete").mkdir()
    (tmp_path / "made.incomplete" / "old.txt").write_text("old")
    with new_folder(tmp_path / "made") as folder:
        (folder / "new.txt").write_text("new")
    assert names(tmp_path) == ["made"]
    assert names(tmp_path / "made") == ["new.txt"]


def test_an_empty_folder_is_free(tmp_path):
    (tmp_path / "made").mkdir()
    with new_folder(tmp_path / "made") as folder:
        (folder / "a.txt").write_text("a")
    assert names(tmp_path / "made") == ["a.txt"]


def test_a_full_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine.txt").write_text("mine")
    entered = []
    with pytest.raises(OutputExistsError, match=r"made already exists\. .*rm -r"), new_folder(tmp_path / "made"):
        entered.append(True)
    assert entered == []
    assert (tmp_path / "made" / "mine.txt").read_text() == "mine"
    assert names(tmp_path) == ["made"]


def test_a_folder_that_fills_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(OSError), new_folder(tmp_path / "made") as folder:
        (folder / "a.txt").write_text("a")
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "mine.txt").write_text("mine")
    assert names(tmp_path) == ["made"]
    assert names(tmp_path / "made") == ["mine.txt"]


def test_refuse_existing(tmp_path):
    refuse_existing(tmp_path / "nothing")
    refuse_existing(tmp_path)  # empty
    (tmp_path / "file").write_text("")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(OutputExistsError):
            refuse_existing(taken)
    with pytest.raises(FileExistsError):  # also as Python's own
        refuse_existing(tmp_path)


def test_a_new_file_appears_at_the_end(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    with new_file(target) as beside:
        beside.write_text("new")
        assert target.read_text() == "old"
        assert beside.parent == tmp_path
    assert target.read_text() == "new"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_file_leaves_the_old_one(tmp_path, error):
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(error), new_file(target) as beside:
        beside.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_new_file_may_never_be_written(tmp_path):
    with pytest.raises(RuntimeError), new_file(tmp_path / "a.json"):
        raise RuntimeError
    assert names(tmp_path) == []


def test_write_text(tmp_path):
    write_text(tmp_path / "card.md", "95 % – ×\n")
    assert (tmp_path / "card.md").read_bytes() == "95 % – ×\n".encode()
    write_text(str(tmp_path / "card.md"), "")
    assert (tmp_path / "card.md").read_bytes() == b""
    assert names(tmp_path) == ["card.md"]


def test_replaced_files_move_in_together(tmp_path):
    target = tmp_path / "run"
    target.mkdir()
    (target / "weights").write_text("old")
    (target / "checkpoint-5").mkdir()
    with replace_files(target) as folder:
        (folder / "weights").write_text("new")
        (folder / "config").write_text("new")
        assert (target / "weights").read_text() == "old"
        assert not (target / "config").exists()
    assert names(target) == ["checkpoint-5", "config", "weights"]
    assert (target / "weights").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_replacement_changes_nothing(tmp_path, error):
    target = tmp_path / "run"
    target.mkdir()
    (target / "weights").write_text("old")
    with pytest.raises(error), replace_files(target) as folder:
        (folder / "weights").write_text("half")
        (folder / "config").write_text("half")
        raise error
    assert names(target) == ["weights"]
    assert (target / "weights").read_text() == "old"


def test_replacing_makes_the_folder_and_clears_what_a_killed_run_left(tmp_path):
    target = tmp_path / "deep" / "run"
    (target / ".incomplete").mkdir(parents=True)
    (target / ".incomplete" / "stale").write_text("stale")
    with replace_files(target) as folder:
        (folder / "weights").write_text("new")
    assert names(target) == ["weights"]


def test_two_runs_do_not_make_one_folder(tmp_path):
    with new_folder(tmp_path / "made", "a conversion of pi0") as folder:
        (folder / "a.txt").write_text("a")
        with (
            pytest.raises(FolderInUseError, match="made is in use by a conversion of pi0"),
            new_folder(tmp_path / "made"),
        ):
            pass
        assert names(folder) == ["a.txt"]
    assert names(tmp_path) == ["made"]


@pytest.mark.parametrize("write", [new_folder, new_file, replace_files])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, write):
    with pytest.raises(DiskFullError, match=r"made.* could not be written"), write(tmp_path / "made") as beside:
        (beside / "a" if beside.is_dir() else beside).write_text("half")
        raise OSError(28, "No space left on device")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
