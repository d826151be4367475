import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from manipulators.data.convert import convert_dataset
from manipulators.data.dataset import LeRobotDataset
from manipulators.data.editing.merging import merge_datasets
from manipulators.data.editing.recomputing import check_statistics, recompute_statistics
from manipulators.data.editing.selecting import select_from_dataset
from manipulators.errors import DatasetFormatError, StaleStatisticsError, UnknownDatasetFeatureError

from ..conftest import edit_rows
from .conftest import TOP, WRIST, record_two_cameras

EPISODES = "meta/episodes/chunk-000/file-000.parquet"


def statistics_of(root):
    return json.loads((root / "meta/stats.json").read_text()), pq.read_table(root / EPISODES).to_pylist()


def test_the_same_as_those_of_a_conversion(recorded, tmp_path):
    """A merged dataset has no quantiles of cameras; computed anew, it has what a conversion of it has."""
    merge_datasets(recorded, tmp_path / "c", progress=False)
    convert_dataset(tmp_path / "c", tmp_path / "converted", progress=False)
    with pytest.raises(StaleStatisticsError) as raised:
        check_statistics(tmp_path / "c", progress=False)
    lines = str(raised.value).splitlines()
    missing = [line for line in lines if line.endswith("is not recorded")]
    assert len(missing) == 10 and missing[0] == f"  {TOP}: q01 is not recorded"
    assert lines[-1] == f"Compute them anew: manipulators dataset stats {tmp_path / 'c'}"
    returned = recompute_statistics(tmp_path / "c", progress=False)
    ours, theirs = statistics_of(tmp_path / "c"), statistics_of(tmp_path / "converted")
    assert ours[0] == theirs[0]
    for row, twin in zip(ours[1], theirs[1], strict=True):
        assert {k: v for k, v in row.items() if "stats" in k} == {k: v for k, v in twin.items() if "stats" in k}
    assert returned[WRIST]["q50"].shape == (3, 1, 1)
    assert check_statistics(tmp_path / "c", progress=False).keys() == returned.keys()


def test_stale_and_missing_ones(recorded, tmp_path):
    a = shutil.copytree(recorded[0], tmp_path / "a")
    expected = statistics_of(a)
    statistics = {name: values for name, values in expected[0].items() if name != "action"}
    statistics["observation.state"]["mean"][1] += 0.1
    (a / "meta/stats.json").write_text(json.dumps(statistics))
    edit_rows(a / EPISODES, lambda rows: [row | {"stats/action/mean": [9.0, 9.0]} for row in rows])
    with pytest.raises(StaleStatisticsError, match="action: none are recorded") as raised:
        check_statistics(a, features=["action", "observation.state"], progress=False)
    assert "observation.state: mean is [" in str(raised.value) and TOP not in str(raised.value)
    recompute_statistics(a, features=["action"], progress=False)
    found = statistics_of(a)
    assert found[0]["action"] == json.loads((recorded[0] / "meta/stats.json").read_text())["action"]
    assert found[1] == expected[1] and found[0]["observation.state"] == statistics["observation.state"]
    with pytest.raises(UnknownDatasetFeatureError, match="Did you mean 'action'"):
        recompute_statistics(a, features=["actions"], progress=False)


def test_a_dataset_without_statistics_of_episodes(tmp_path):
    """Of cameras they are pooled, so that they must be there; `dataset stats` adds them."""
    a = record_two_cameras(tmp_path / "a", (2, 3), use_videos=False)
    table = pq.read_table(a / EPISODES)
    pq.write_table(table.select([name for name in table.column_names if not name.startswith("stats/")]), a / EPISODES)
    with pytest.raises(DatasetFormatError, match=f"no statistics .* of {TOP} .* manipulators dataset stats {a}"):
        select_from_dataset(a, tmp_path / "c", episodes=[0], progress=False)
    recompute_statistics(a, progress=False)
    select_from_dataset(a, tmp_path / "c", episodes=[0], progress=False)
    new = LeRobotDataset(tmp_path / "c")
    pixels = np.stack([sample[TOP].numpy() for sample in new]) / 255
    np.testing.assert_allclose(new.statistics[TOP]["mean"].ravel(), pixels.mean(axis=(0, 2, 3)), atol=1e-6)
    assert pq.read_table(tmp_path / "c" / EPISODES).to_pylist()[0][f"stats/{TOP}/q50"]
