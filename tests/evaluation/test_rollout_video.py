import av
import numpy as np
import pytest
import torch

from manipulators.errors import InvalidActionError, MissingRendererError
from manipulators.evaluation import registry
from manipulators.evaluation.rollout import evaluate


class Pipeline:
    """Drive right as fast as the world allows."""

    speed = 1.0

    def reset(self):
        pass

    def __call__(self, observation, task):
        return torch.full((len(task), 1), self.speed)


def frames(path):
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def film(name, seeds, path, **kwargs):
    return evaluate(Pipeline(), name, seeds, progress=False, video=path, **kwargs)


def test_the_first_episodes_stand_side_by_side(line, tmp_path):
    path = tmp_path / "rollout.mp4"
    result = film(line, range(3), path, num_envs=10)
    pictures = frames(path)
    # Seed 0 takes 5 steps, seeds 1 and 2 fewer; the end stays for a second at 10 Hz.
    assert len(pictures) == 1 + 4 + 10
    assert pictures[0].shape == (16, 3 * 16, 3)
    for column, position in enumerate((0, 1, 2)):
        assert pictures[0][8, 16 * column + 8] == pytest.approx([20 * position] * 3, abs=8)
    assert pictures[1][8, 8] == pytest.approx([20] * 3, abs=8)
    r, g, b = pictures[-1][1:3, 1:15].mean(axis=(0, 1))  # the border of a solved episode
    assert g > r + 30
    assert g > b + 30
    assert (result.video, result.successes) == ("rollout.mp4", 3)
    assert result.video_note == ("The first 3 episodes of the evaluation, in real time; a green border means solved.")
    assert [entry.name for entry in tmp_path.iterdir()] == ["rollout.mp4"]


def test_four_episodes_are_filmed_however_they_are_grouped(line, tmp_path):
    result = film(line, [3, 4, 2, 1, 0], tmp_path / "a.mp4", num_envs=3)
    pictures = frames(tmp_path / "a.mp4")
    # Groups (3, 4, 2) and (1, 0), of which 1 is filmed: 3 and 4 steps and a second each.
    assert len(pictures) == (1 + 2 + 10) + (1 + 3 + 10)
    assert pictures[0].shape == pictures[-1].shape == (16, 48, 3)
    assert pictures[-1][:, 20:].max() < 10  # empty places are black
    assert "first 4 episodes" in result.video_note


def test_the_film_changes_no_result(line, tmp_path):
    filmed = film(line, range(5), tmp_path / "a.mp4", num_envs=2)
    plain = evaluate(Pipeline(), line, range(5), num_envs=2, progress=False)
    assert filmed.per_episode == plain.per_episode
    assert (plain.video, plain.video_note) == (None, None)


def test_fast_control_is_watched_in_slow_motion(renderer, tmp_path):
    class Still(Pipeline):
        def __call__(self, observation, task):
            return np.zeros((len(task), 4), np.float32)

    path = tmp_path / "videos" / "reach.mp4"
    result = evaluate(Still(), "metaworld/reach-v3", [0], horizon=5, progress=False, video=path)
    assert result.video_note.startswith("The first episode of the evaluation, at 0.25 of real speed")
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.height, stream.width) == ("h264", 240, 240)
        assert float(stream.average_rate) == 20


@pytest.mark.parametrize(
    ("failure", "words"),
    [(MissingRendererError({"egl": "gone"}), "apt-get install"), (NotImplementedError(), "does not draw itself")],
)
def test_without_a_renderer_the_result_says_why(line, tmp_path, monkeypatch, failure, words):
    def render(self):
        raise failure

    monkeypatch.setattr(registry._FAMILIES["line"].factory, "render", render)
    result = film(line, [1], tmp_path / "a.mp4")
    assert (result.video, result.successes) == (None, 1)
    assert result.video_note.startswith("There is no video: ")
    assert words in result.video_note
    assert not list(tmp_path.iterdir())


def test_a_failed_evaluation_leaves_no_file(line, tmp_path):
    class Broken(Pipeline):
        speed = float("nan")

    with pytest.raises(InvalidActionError):
        evaluate(Broken(), line, [1], progress=False, video=tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_what_raises_while_it_is_drawn_costs_no_episode(line, tmp_path, monkeypatch):
    """Seed 1 cannot be drawn at position 2, and seed 3 cannot be reset."""
    factory = registry._FAMILIES["line"].factory
    render, reset = factory.render, factory.reset

    def flaky_render(self):
        return None if self.position == 2 else render(self)

    def flaky_reset(self, *, seed=None, options=None):
        return reset(self, seed=seed, options=options) if seed != 3 else 1 / 0

    monkeypatch.setattr(factory, "render", flaky_render)
    monkeypatch.setattr(factory, "reset", flaky_reset)
    result = film(line, [1, 3], tmp_path / "a.mp4")
    assert (result.successes, result.errors, result.video) == (1, 1, "a.mp4")
    pictures = frames(tmp_path / "a.mp4")
    assert [int(picture[8, 8].mean()) for picture in pictures[:3]] == pytest.approx([20, 20, 60], abs=4)
    assert pictures[0][8, 24].max() < 5  # black

    result = film(line, [3, 1], tmp_path / "b.mp4")
    assert (result.successes, result.video) == (1, None)
    assert result.video_note == "There is no video: line/right raised ZeroDivisionError: division by zero"


def test_an_evaluation_that_goes_on_films_the_first_episodes_again(line, tmp_path):
    class Stopped(Pipeline):
        groups = 0

        def reset(self):
            self.groups += 1
            if self.groups == 6:
                raise KeyboardInterrupt

    paths = {"path": tmp_path / "a.mp4", "output": tmp_path / "a.json", "num_envs": 1}
    with pytest.raises(KeyboardInterrupt):
        evaluate(Stopped(), line, range(7), progress=False, video=paths["path"], output=paths["output"], num_envs=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.partial.json"]
    result = film(line, range(7), **paths)
    whole = film(line, range(7), tmp_path / "whole.mp4", num_envs=1)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert result.per_episode == whole.per_episode
