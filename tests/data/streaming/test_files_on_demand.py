import pytest

from manipulators.data.streaming.files_on_demand import FilesOnDemand


def test_a_file_that_leaves_the_cache_before_it_is_opened_is_fetched_again():
    files, found = object.__new__(FilesOnDemand), []

    def read(place):
        if len(found) < 3:
            raise FileNotFoundError(place)
        return place

    def find(path):
        found.append(path)
        return path

    assert files.opened(find, "a", read) == "a" and found == ["a"] * 3
    found.clear()
    with pytest.raises(FileNotFoundError):
        files.opened(find, "a", lambda place: read(found.clear()))
