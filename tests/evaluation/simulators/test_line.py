"""The line: recorded by its expert, and found by its name."""

from manipulators import record_demonstrations
from manipulators.evaluation.environments import available_environments


def test_it_is_found_and_recorded(tmp_path):
    assert "line/right" in available_environments()
    recorded = record_demonstrations("line/right?camera=front&size=16", 2, tmp_path / "line", progress=False)
    assert (recorded.episodes, recorded.frames) == (2, 9)
