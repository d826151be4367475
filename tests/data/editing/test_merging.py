import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manipulators.data.dataset import LeRobotDataset
from manipulators.data.editing.compose import _statistics_of_indices
from manipulators.data.editing.merging import merge_datasets
from manipulators.data.editing.source import open_source
from manipulators.data.layouts.writer import plain_statistics
from manipulators.data.statistics.computing import compute_statistics
from manipulators.errors import (
    DatasetIndexError,
    DatasetVersionError,
    DifferentDatasetsError,
    DiskFullError,
    OutputExistsError,
    UnknownDatasetFeatureError,
    VideoError,
)

from ..conftest import edit_json, edit_rows, record_v2
from .conftest import FEATURES, TOP, WRIST, assert_episodes_are, encode_in_long_groups, record_two_cameras


def info_of(root):
    return json.loads((root / "meta/info.json").read_text())


def test_every_frame_and_number_stays(recorded, tmp_path):
    a, b = recorded
    assert merge_datasets([a, b], tmp_path / "c", progress=False) == tmp_path / "c"
    new = assert_episodes_are(tmp_path / "c", *((a, n) for n in range(4)), *((b, n) for n in range(2)))
    assert new.tasks == ["push", "pull", "lift"]
    assert [new[row]["task"] for row in (0, 3, 14, 16)] == ["push", "pull", "pull", "lift"]
    info = info_of(tmp_path / "c")
    assert [info[f"total_{name}"] for name in ("episodes", "frames", "tasks")] == [6, 19, 3]
    assert info["splits"] == {"train": "0:6"} and info["robot_type"] == "tiny"
    # Videos of one encoding share one file per camera.
    assert len(list((tmp_path / "c").rglob("*.mp4"))) == 2
    rows = pq.read_table(tmp_path / "c/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["tasks"] for row in rows] == [["push"], ["pull"], ["push"], ["pull"], ["pull"], ["lift"]]
    assert [row[f"videos/{TOP}/from_timestamp"] for row in rows] == [0.0, 0.3, 0.7, 0.9, 1.4, 1.6]
    assert rows[5]["stats/episode_index/mean"] == [5.0] and rows[5]["stats/task_index/max"] == [2.0]
    # The statistics are those of all frames; quantiles of cameras cannot be pooled.
    whole = np.stack([sample["action"][0].numpy() for sample in new])
    np.testing.assert_allclose(new.statistics["action"]["q90"], np.quantile(whole, 0.9, axis=0), atol=1e-6)
    parts = [LeRobotDataset(root).statistics[WRIST] for root in (a, b)]
    pooled = (14 * parts[0]["mean"] + 5 * parts[1]["mean"]) / 19
    np.testing.assert_allclose(new.statistics[WRIST]["mean"], pooled, atol=1e-6)
    assert set(new.statistics[WRIST]) == {"min", "max", "mean", "std", "count"}
    assert new.statistics[WRIST]["count"] == [19]
    origin = json.loads((tmp_path / "c/meta/origin.json").read_text())
    assert [(s["source"], s["episodes"]) for s in origin["sources"]] == [("a", "0-3"), ("b", "0-1")]


def test_what_differs_is_listed_with_what_mends_it(recorded, tmp_path):
    a, _ = recorded
    others = {
        "observation.images.front": FEATURES[TOP],
        WRIST: FEATURES[WRIST],
        "observation.state": FEATURES["observation.state"] | {"names": ["y", "x"]},
        "action": FEATURES["action"] | {"shape": [3], "names": ["x", "y", "z"]},
        "reward": {"dtype": "float32", "shape": [1]},
    }
    d = record_two_cameras(tmp_path / "d", (2,), features=others, fps=20, robot_type="other")
    with pytest.raises(DifferentDatasetsError) as raised:
        merge_datasets([a, d], tmp_path / "c", progress=False)
    message = str(raised.value)
    assert len(raised.value.problems) == 8
    for text in (
        f"fps: 10 of {a}, 20 of {d}",
        f"robot_type: 'tiny' of {a}, 'other' of {d}",
        f"--rename-map observation.images.front={TOP}",
        "leave it out: --drop reward",
        f"observation.state: names (x, y) of {a}, (y, x) of {d}",
        f"action: shape [2] of {a}, [3] of {d}",
    ):
        assert text in message
    assert not list(tmp_path.glob("c*"))


def test_the_remedies_work(recorded, tmp_path):
    a, _ = recorded
    features = {
        "observation.images.front": FEATURES[TOP],
        WRIST: FEATURES[WRIST],
        "observation.state": FEATURES["observation.state"],
        "action": FEATURES["action"],
        "reward": {"dtype": "float32", "shape": [1]},
    }
    d = record_two_cameras(tmp_path / "d", (2, 2), features=features, robot_type="other")
    merge_datasets(
        [a, d],
        tmp_path / "c",
        rename_map={"observation.images.front": TOP},
        drop=["reward", WRIST],
        robot_type="tiny",
        progress=False,
    )
    new, old = LeRobotDataset(tmp_path / "c"), LeRobotDataset(d)
    assert list(new.recorded_features) == [TOP, "observation.state", "action"]
    assert new[14][TOP].equal(old[0]["observation.images.front"]) and new[14]["task"] == "push"
    assert len(new) == 18 and len(list((tmp_path / "c").rglob("*.mp4"))) == 1


def test_other_encodings_and_sizes_begin_a_new_file(recorded, tmp_path):
    a, _ = recorded
    other = record_two_cameras(tmp_path / "other", (2, 3), seed=3, codec="av1", video_files_size_in_mb=1e-6)
    merge_datasets(
        [
            other,
            a,
        ],
        tmp_path / "c",
        progress=False,
    )
    assert_episodes_are(tmp_path / "c", (other, 0), (other, 1), *((a, n) for n in range(4)))
    feature = info_of(tmp_path / "c")["features"][TOP]["info"]
    assert feature["video.codec"] is None and feature["video.height"] == 32
    # The limit on the size of files is the first dataset's.
    assert len(list((tmp_path / "c" / "videos" / TOP).rglob("*.mp4"))) == 3


def test_images_in_the_data_files(tmp_path):
    a, b = (record_two_cameras(tmp_path / name, (2, 3), seed=i, use_videos=False) for i, name in enumerate("ab"))
    merge_datasets([a, b], tmp_path / "c", progress=False)
    assert_episodes_are(tmp_path / "c", (a, 0), (a, 1), (b, 0), (b, 1))
    assert not list((tmp_path / "c").rglob("*.mp4"))


def test_columns_of_other_types_and_further_columns_of_episodes(recorded, tmp_path):
    """Other writers store lists without a length, and marks of a person beside an episode."""
    a, _ = recorded
    b = record_two_cameras(tmp_path / "b", (2, 2), seed=1)
    path = b / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    plain = [pa.field(f.name, pa.list_(pa.float64()) if f.name == "action" else f.type) for f in table.schema]
    pq.write_table(table.cast(pa.schema(plain)).replace_schema_metadata(None), path)
    for root, marks in ((b, ["good", "bad"]),):
        episodes = root / "meta/episodes/chunk-000/file-000.parquet"
        pq.write_table(pq.read_table(episodes).append_column("mark", pa.array(marks)), episodes)
    merge_datasets([a, b], tmp_path / "c", progress=False)
    assert_episodes_are(tmp_path / "c", *((a, n) for n in range(4)), (b, 0), (b, 1))
    merge_datasets([b, a], tmp_path / "d", progress=False)
    assert_episodes_are(tmp_path / "d", (b, 0), (b, 1), *((a, n) for n in range(4)))
    assert "mark" not in pq.read_table(tmp_path / "d/meta/episodes/chunk-000/file-000.parquet").column_names


def test_arguments_that_do_not_fit(recorded, tmp_path):
    a, b = recorded
    for sources in ([a], []):
        with pytest.raises(DatasetIndexError, match="at least two datasets"):
            merge_datasets(sources, tmp_path / "c")
    with pytest.raises(DatasetIndexError, match="named twice"):
        merge_datasets([a, a], tmp_path / "c")
    with pytest.raises(OutputExistsError, match="the source itself"):
        merge_datasets([a, b], b)
    with pytest.raises(OutputExistsError, match="would lie inside"):
        merge_datasets([a, b], b / "merged")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/kept").write_text("")
    with pytest.raises(OutputExistsError):
        merge_datasets([a, b], tmp_path / "c")
    for arguments in ({"drop": ["observation.image.top"]}, {"rename_map": {"observation.image.top": "x"}}):
        with pytest.raises(UnknownDatasetFeatureError, match=f"no dataset has. Did you mean '{TOP}'"):
            merge_datasets([a, b], tmp_path / "d", **arguments)
    with pytest.raises(UnknownDatasetFeatureError, match="which every dataset has"):
        merge_datasets([a, b], tmp_path / "d", drop=["index"])
    old = record_v2(tmp_path / "old", "v2.1")
    with pytest.raises(DatasetVersionError, match=f"manipulators convert-dataset {old} <new folder>"):
        merge_datasets([a, old], tmp_path / "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "old"]


def test_a_broken_source_or_a_full_disk_leaves_nothing(recorded, tmp_path, monkeypatch):
    a, _ = recorded
    b = record_two_cameras(tmp_path / "b", (2, 3))
    video = b / f"videos/{WRIST}/chunk-000/file-000.mp4"
    content = video.read_bytes()
    encode_in_long_groups(video, 4, 64, 64)
    with pytest.raises(VideoError, match=r"holds 4 frames from 0\.000 s on; its episodes need 5"):
        merge_datasets([a, b], tmp_path / "c", progress=False)
    video.write_bytes(content)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("manipulators.data.layouts.writer._write_json", full)
        with pytest.raises(DiskFullError, match="c could not be written"):
            merge_datasets([a, b], tmp_path / "c", progress=False)
    edit_rows(b / "data/chunk-000/file-000.parquet", lambda rows: [row | {"episode_index": 0} for row in rows])
    with pytest.raises(ValueError, match="has 3 rows with episode_index 0 where the metadata say episode 1"):
        merge_datasets([a, b], tmp_path / "c", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


def test_licences_and_cards(recorded, tmp_path):
    a = record_two_cameras(tmp_path / "a", (2,))
    b = record_two_cameras(tmp_path / "b", (2,), seed=1)
    for root, name in ((a, "apache-2.0"), (b, "cc-by-4.0")):
        (root / "README.md").write_text(f"---\nlicense: {name}\n---\n# Demonstrations\n")
        (root / "LICENSE").write_text(name)
    merge_datasets([a, b], tmp_path / "c", progress=False)
    origin = json.loads((tmp_path / "c/meta/origin.json").read_text())
    assert [source["license"] for source in origin["sources"]] == ["apache-2.0", "cc-by-4.0"]
    assert [(tmp_path / f"c/LICENSE-{name}").read_text() for name in "ab"] == ["apache-2.0", "cc-by-4.0"]
    assert not (tmp_path / "c/README.md").exists()


def test_only_some_rows_of_episodes_are_in_memory(recorded, monkeypatch, tmp_path):
    """The statistics of episodes are read, and the table is written, in parts."""
    monkeypatch.setattr("manipulators.data.editing.source.AT_ONCE", 2)
    monkeypatch.setattr("manipulators.data.layouts.episodes._ROWS_AT_ONCE", 2)
    a, b = recorded
    edited = record_two_cameras(tmp_path / "small", (2, 2, 2))
    edit_json(edited / "meta/info.json", data_files_size_in_mb=1e-6)
    merge_datasets([edited, a, b], tmp_path / "c", progress=False)
    files = sorted((tmp_path / "c/meta/episodes").rglob("*.parquet"))
    assert [pq.read_metadata(path).num_rows for path in files] == [2, 2, 2, 2, 1]
    expected = [*((edited, n) for n in range(3)), *((a, n) for n in range(4)), (b, 0), (b, 1)]
    assert_episodes_are(tmp_path / "c", *expected)
    source = open_source(tmp_path / "c")
    # Also not in the order of the files.
    rows = source.episode_rows(np.asarray([8, 0]))
    assert [row["stats/episode_index/min"] for row in rows] == [[8.0], [0.0]]


def test_statistics_of_index_columns_are_those_of_their_numbers():
    for numbers in ([7], [3, 3, 3], [5, 6, 7, 8], [0, 1, 1, 2], [2, 0], [1000000, 1000001]):
        expected = plain_statistics(compute_statistics(np.asarray(numbers)[:, None]))
        assert _statistics_of_indices(np.asarray(numbers)) == expected
