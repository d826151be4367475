"""Metadata as nobody has written them yet: whatever is in them, an error is one of this library's."""

import copy
import json
import random
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manipulators import LeRobotDataset
from manipulators.errors import DatasetFormatError, ManipulatorsError

from ..conftest import edit_json, record, record_v2

JUNK = [
    None,
    True,
    0,
    -1,
    2**40,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../..",
    "{",
    "{x}",
    [],
    [1],
    ["a"],
]
JUNK += [[[1]], {}, {"a": {"b": [1, None]}}, [None], "é\0", 10**400]


def places(value, before=()):
    """Yield the path to everything in a JSON value, itself left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*before, key)
        yield from places(item, (*before, key))


def broken(value, rng):
    """Return a JSON value with one thing in it removed, renamed or replaced."""
    value = copy.deepcopy(value)
    *path, last = rng.choice(list(places(value)))
    holder = value
    for key in path:
        holder = holder[key]
    way = rng.random() if isinstance(holder, dict) else 1.0
    if way < 0.2:
        del holder[last]
    elif way < 0.3:
        holder[rng.choice(["../x", "", "a/b", "task", "x" * 300])] = holder.pop(last)
    else:
        holder[last] = rng.choice(JUNK)
    return value


def look_at(root):
    """Use everything that a dataset says of itself."""
    dataset = LeRobotDataset(root, action_horizon=2, features=["observation.state", "action", "next.reward"])
    for use in (
        lambda: dataset[0],
        lambda: dataset.statistics,
        lambda: dataset.policy_features,
        lambda: (repr(dataset), dataset._repr_html_(), dataset.units),
    ):
        with suppress(ManipulatorsError):
            use()


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_every_error_is_one_of_ours(tmp_path, version):
    root, rng, errors = tmp_path / "set", random.Random(1), set()
    record(root) if version == "v3.0" else record_v2(root, version)
    for path in sorted(root.glob("meta/*.json*")):
        text = path.read_text()
        lines = [text] if path.suffix == ".json" else text.splitlines()
        for _ in range(60):
            number = rng.randrange(len(lines))
            path.write_text(
                "\n".join([*lines[:number], json.dumps(broken(json.loads(lines[number]), rng)), *lines[number + 1 :]])
            )
            try:
                look_at(root)
            except ManipulatorsError as error:
                errors.add(type(error))
        path.write_text(text)
    look_at(root)
    assert DatasetFormatError in errors


COLUMNS = {
    "nothing": pa.nulls(2),
    "text": pa.array(["a", "b"]),
    "lists": pa.array([[1.0], [2.0]]),
    "mappings": pa.array([{"a": 1}, {"a": 2}]),
    "bytes": pa.array([b"a", b"b"]),
    "truths": pa.array([True, False]),
    "huge numbers": pa.array([10**18, 10**18]),
    "no numbers": pa.array([float("nan"), 1.0]),
    "half nothing": pa.array([None, 1]),
    "negative numbers": pa.array([-1, -2]),
    "words of a dictionary": pa.array(["a", "b"]).dictionary_encode(),
    "dates": pa.array([0, 1], pa.timestamp("s")),
}


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("meta/tasks.parquet", ["task_index", "task"]),
        (
            "meta/episodes/chunk-000/file-000.parquet",
            ["episode_index", "length", "dataset_to_index", "data/file_index"],
        ),
    ],
)
def test_every_error_of_tables_is_one_of_ours(tmp_path, file, names):
    root, refused = record(tmp_path / "set"), set()
    table = pq.read_table(root / file).replace_schema_metadata(None)
    for name in names:
        others = table.drop_columns([name])
        for kind, changed in [("absent", others), *((k, others.append_column(name, c)) for k, c in COLUMNS.items())]:
            pq.write_table(changed, root / file)
            try:
                look_at(root)
            except ManipulatorsError:
                refused.add((name, kind))
    assert {(names[0], kind) for kind in ("absent", "nothing", "lists", "dates", "half nothing")} <= refused


def test_every_error_of_data_is_one_of_ours(tmp_path):
    root, refused = record(tmp_path / "set", (2,)), set()
    file = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file).replace_schema_metadata(None)
    for name in ("action", "observation.state", "timestamp", "episode_index", "task_index"):
        for kind, column in COLUMNS.items():
            pq.write_table(table.set_column(table.column_names.index(name), name, column), file)
            try:
                look_at(root)
            except ManipulatorsError:
                refused.add((name, kind))
    assert {("action", "text"), ("observation.state", "dates"), ("timestamp", "no numbers")} <= refused
    assert ("action", "truths") not in refused  # read as 0 and 1
    file.write_bytes(file.read_bytes()[:-9] + b"damaged!!")
    with pytest.raises(DatasetFormatError, match=r"file-000\.parquet cannot be read as a parquet file"):
        look_at(root)


def test_names_of_any_form(tiny):
    info = json.loads((tiny / "meta/info.json").read_text())
    for names, expected in [
        ([0, 1], ["0", "1"]),
        ({"motors": ["a", "b"]}, ["a", "b"]),
        ({"x": 1, "y": 0}, ["y", "x"]),
        ([["a"], ["b"]], ["a", "b"]),
        (["a"], None),
        (5, None),
        ({}, None),
        ([None, None], None),
    ]:
        info["features"]["observation.state"]["names"] = names
        edit_json(tiny / "meta/info.json", features=info["features"])
        assert LeRobotDataset(tiny).dimension_names["observation.state"] == expected
