"""Statistics that cannot be of the data are found before a policy is normalised by them, and conversion heals them."""

import json

import numpy as np
import pytest

from manipulators import LeRobotDataset, convert_dataset
from manipulators.errors import DatasetFormatError

from ..conftest import edit_json, record, record_v2

CAMERA = "observation.images.top"
STATE = "observation.state"


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    return json.loads((record(tmp_path_factory.mktemp("plain") / "tiny") / "meta/stats.json").read_text())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (STATE, {"std": [2e6, 2e6]}, "dimension 0 has std 2e.06, min 0, max 6"),
        (STATE, {"std": [2.0, 3.9]}, "dimension 1 has std 3.9, min -6, max 0"),
        (STATE, {"std": [-1.0, 2.0]}, "dimension 0 has std -1"),
        (STATE, {"mean": [7.0, -3.0]}, "dimension 0 has mean 7"),
        (STATE, {"min": [7.0, -6.0]}, "dimension 0 has min 7, max 6"),
        (STATE, {"q01": [5.0, -6.0], "q99": [4.0, -1.0]}, "dimension 0 has q01 5, q99 4"),
        (STATE, {"q99": [6.0, 2.0]}, "dimension 1 has q99 2"),
        (STATE, {"mean": [3.0]}, r"mean has 1 values \(shape \(1,\)\), not 2 values"),
        (STATE, {"std": [None, 2.0]}, "std is not finite"),
        (STATE, {"min": [0, -6e3], "max": [6e3, 0], "mean": [3e3, -3e3]}, "dimension 0 .* the data lie between 0"),
        (STATE, {"max": [0.02, 0.0], "mean": [0.01, 0.0], "min": [0.0, -0.02]}, "the data lie between 0 and 6"),
        (CAMERA, {"max": [[[255.0]]] * 3, "mean": [[[99.0]]] * 3}, "dimension 0 has .*; those of a camera lie in"),
        (CAMERA, {"mean": [[[0.5]]] * 2}, r"mean has 2 values \(shape \(2, 1, 1\)\), not one value per channel"),
    ],
)  # fmt: skip
def test_impossible_statistics_are_refused_and_healed(tmp_path, statistics, name, change, message):
    root = record(tmp_path / "set")
    values = statistics[name] | change
    for quantile in ("q01", "q10", "q50", "q90", "q99"):
        values = values if quantile in change else {key: v for key, v in values.items() if key != quantile}
    if "min" in change and len(change) == 3:
        values.pop("std")
    edit_json(root / "meta/stats.json", **{name: values})
    dataset = LeRobotDataset(root)
    with pytest.raises(
        DatasetFormatError, match=rf"statistics of {name} .*{message}.*manipulators convert-dataset {root}"
    ):
        dataset.statistics
    others = [other for other in ("action", STATE, CAMERA) if other != name]
    assert LeRobotDataset(root, features=others).statistics["action"]["max"] == 60
    healed = LeRobotDataset(convert_dataset(root, tmp_path / "healed", progress=False)).statistics
    assert healed[STATE]["std"].tolist() == pytest.approx([2, 2]) and healed[STATE]["q99"].shape == (2,)


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
@pytest.mark.parametrize("damage", [None, "{", "[]", '{"action": 3}', '{"action": {"mean": ["x"]}}'])
def test_absent_or_damaged_statistics_name_the_remedy(tmp_path, version, damage):
    root = tmp_path / "my set"
    record(root) if version == "v3.0" else record_v2(root, version)
    path = root / ("meta/episodes_stats.jsonl" if version == "v2.1" else "meta/stats.json")
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage)
    dataset = LeRobotDataset(root)
    assert len(dataset[:]["action"]) == 7
    with pytest.raises(
        DatasetFormatError, match=r"anew: manipulators convert-dataset '.*my set' <new folder>$"
    ) as raised:
        dataset.statistics
    assert "ownload" not in str(raised.value)


def test_statistics_of_a_few_frames_divided_by_one_less_are_accepted(tmp_path):
    root = record(tmp_path / "set", (2,))
    edit_json(
        root / "meta/stats.json", action={"min": [0.0], "max": [10.0], "mean": [5.0], "std": [50**0.5], "count": [2]}
    )
    assert LeRobotDataset(root).statistics["action"]["std"] == np.float32(50**0.5)


def test_what_no_policy_reads_is_not_checked(tmp_path, statistics):
    root = record(tmp_path / "set")
    edit_json(root / "meta/stats.json", **{"next.reward": statistics["next.reward"] | {"std": [float("nan")]}})
    assert np.isnan(LeRobotDataset(root).statistics["next.reward"]["std"])
