"""Paths that somebody else's metadata names never lead out of the dataset."""

import pytest

from manipulators import LeRobotDataset, convert_dataset
from manipulators.data.layouts.paths import is_inside
from manipulators.errors import DatasetFormatError, UnknownDatasetFeatureError

from ..conftest import edit_json, record, record_v2

CAMERA = "observation.images.top"


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
@pytest.mark.parametrize("key", ["data_path", "video_path"])
@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("../victim/{%s}", "outside the dataset's folder"),
        ("/etc/{%s}", "outside the dataset's folder"),
        ("data/../../victim/{%s}", "outside the dataset's folder"),
        ("C:\\{%s}", "outside the dataset's folder"),
        ("data/{%s.__class__}", r"\{\w+\.__class__\} cannot be filled in"),
        ("data/{%s[0]}", r"\{\w+\[0\]\} cannot be filled in"),
        ("data/{%s!r}", "cannot be filled in"),
        ("data/{%s:9999999d}", "cannot be filled in"),
        ("data/{%s", "no path with names in braces"),
    ],
)
def test_templates_that_lead_elsewhere_are_refused(datasets_of_all_versions, version, key, template, message):
    root = datasets_of_all_versions[version]
    info = (root / "meta/info.json").read_text()
    field = "file_index" if version == "v3.0" else "episode_index"
    edit_json(root / "meta/info.json", **{key: template % field})
    try:
        with pytest.raises(DatasetFormatError, match=rf"meta/info\.json has the {key} .*{message}"):
            LeRobotDataset(root)
    finally:
        (root / "meta/info.json").write_text(info)


@pytest.fixture(scope="module")
def datasets_of_all_versions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("all")
    old = {version: record_v2(folder / version, version, (3,)) for version in ("v2.0", "v2.1")}
    return old | {"v3.0": record(folder / "v3.0", (3,))}


def test_a_camera_cannot_be_named_out_of_the_folder(tmp_path):
    """Conversion would write its videos over those of another dataset."""
    victim, root = record(tmp_path / "victim"), record(tmp_path / "set")
    videos = {path: path.read_bytes() for path in victim.rglob("*.mp4")}
    name = "../../victim/videos/observation.images.top"
    info = (root / "meta/info.json").read_text()
    (root / "meta/info.json").write_text(info.replace(CAMERA, name))
    for read in (lambda: LeRobotDataset(root), lambda: convert_dataset(root, tmp_path / "new", progress=False)):
        with pytest.raises(DatasetFormatError, match=r"a camera called '\.\./\.\./victim"):
            read()
    (root / "meta/info.json").write_text(info)
    for read in (LeRobotDataset, lambda *a, **k: convert_dataset(root, tmp_path / "new", progress=False, **k)):
        with pytest.raises(DatasetFormatError, match=r"a camera called '\.\./\.\./victim"):
            read(root, rename_map={CAMERA: name})
    assert {path: path.read_bytes() for path in victim.rglob("*.mp4")} == videos


def test_links_are_followed(tmp_path):
    """Their owner has set them; the Hub's cache consists of links."""
    root = record(tmp_path / "set")
    (root / "data").rename(tmp_path / "elsewhere")
    (root / "data").symlink_to(tmp_path / "elsewhere")
    assert len(LeRobotDataset(root)) == 7


@pytest.mark.parametrize("path", ["a/b", "a..b/c", "videos//x", "...", "é/ü"])
def test_paths_inside(path):
    assert is_inside(path)


@pytest.mark.parametrize("path", ["", "..", "a/..", "/a", "a\\b", "c:/x", "a\0", "x" * 256])
def test_paths_outside(path):
    assert not is_inside(path)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_features_under_other_names(tmp_path, version):
    root = tmp_path / "openpi"
    record(root) if version == "v3.0" else record_v2(root, version)
    plain = LeRobotDataset(root, action_horizon=2)
    names = {CAMERA: "observation.images.base", "observation.state": "action", "action": "observation.state"}
    dataset = LeRobotDataset(root, action_horizon=2, rename_map=names)
    assert dataset[4]["action"].tolist() == [[4.0, -4.0], [5.0, -5.0]] and dataset[4]["observation.state"] == 40
    assert dataset[4]["observation.images.base"].equal(plain[4][CAMERA])
    assert dataset.statistics["action"]["max"].tolist() == [6, 0]
    written = convert_dataset(root, tmp_path / "new", progress=False, rename_map=names)
    assert LeRobotDataset(written, action_horizon=2)[4]["action"].equal(dataset[4]["action"])
    for wrong, message in (
        ({"acton": "x"}, "Did you mean 'action'"),
        ({"action": CAMERA}, "another feature has"),
        (["x"], "must"),
    ):
        with pytest.raises(UnknownDatasetFeatureError, match=message):
            LeRobotDataset(root, rename_map=wrong)
