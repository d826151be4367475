"""What a dataset costs as it grows: seconds and memory of opening, reading, statistics and conversion.

    python benchmarks/scale.py --output outputs/scale                        # 1 k, 10 k and 100 k episodes
    python benchmarks/scale.py --output outputs/scale --before FOLDER        # beside another version, in turn

FOLDER holds the other version as the package `manipulators` (a link to a checkout will do). The datasets are written
into the output folder, about 3 GB of them and twice as much of what is made of them, and removed afterwards. Episodes
have 300 frames of a state and an action of 7 numbers, in files of about 100 MB with a row group per episode, as
LeRobot writes them. Every figure is of a fresh process that has imported the library. RSS and its peak count the pages
of mapped files that are in memory, which all processes share and the operating system takes back when it needs them.
USS is what no other process shares, such pages included where no other process reads them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FRAMES, WIDTH, FPS, TASKS = 300, 7, 30, 10
PER_FILE = 3300  # episodes, about 100 MB
PER_VIDEO = 500
CAMERAS = ("observation.images.top", "observation.images.wrist")
BATCH, BATCHES = 64, 100


# --- datasets -------------------------------------------------------------------------------------------------


def frames(first: int, count: int, generator: np.random.Generator) -> pa.Table:
    """Return the rows of `count` episodes from episode `first` on."""
    rows = count * FRAMES

    def vectors() -> pa.Array:
        values = generator.standard_normal(rows * WIDTH, dtype=np.float32)
        return pa.FixedSizeListArray.from_arrays(pa.array(values), WIDTH)

    steps = np.tile(np.arange(FRAMES), count)
    episodes = np.repeat(np.arange(first, first + count), FRAMES)
    return pa.table(
        {
            "observation.state": vectors(),
            "action": vectors(),
            "timestamp": (steps / FPS).astype(np.float32),
            "frame_index": steps,
            "episode_index": episodes,
            "index": np.arange(first * FRAMES, first * FRAMES + rows),
            "task_index": episodes % TASKS,
        }
    )


def info(version: str, episodes: int, cameras: Sequence[str], **paths: str) -> dict:
    """Return `meta/info.json`."""
    vectors = {name: {"dtype": "float32", "shape": [WIDTH], "names": None} for name in ("observation.state", "action")}
    index = {
        name: {"dtype": "int64", "shape": [1], "names": None} for name in ("frame_index", "episode_index", "index")
    }
    index |= {"task_index": index["index"], "timestamp": {"dtype": "float32", "shape": [1], "names": None}}
    videos = {name: {"dtype": "video", "shape": [480, 640, 3], "names": None} for name in cameras}
    totals = {"total_episodes": episodes, "total_frames": episodes * FRAMES, "total_tasks": TASKS}
    return {
        "codebase_version": version, "robot_type": None, "fps": FPS, "chunks_size": 1000, "splits": {},
        "features": vectors | videos | index, **totals, **paths,
    }  # fmt: skip


def statistics() -> dict:
    """Return statistics that such data may have, per feature."""
    ends = {"min": -6.0, "max": 6.0, "mean": 0.0, "std": 1.0}
    ends |= {"q01": -2.33, "q10": -1.28, "q50": 0.0, "q90": 1.28, "q99": 2.33}
    one = {key: [value] * WIDTH for key, value in ends.items()} | {"count": [FRAMES]}
    return {"observation.state": one, "action": one}


def write_v3(folder: Path, episodes: int, cameras: Sequence[str] = ()) -> None:
    """Write version 3.0; the cameras' videos are empty files, which opening does not read."""
    generator = np.random.default_rng(0)
    for file, first in enumerate(range(0, episodes, PER_FILE)):
        path = folder / f"data/chunk-000/file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(frames(first, min(PER_FILE, episodes - first), generator), path, row_group_size=FRAMES)
    numbers = np.arange(episodes)
    table = {
        "episode_index": numbers,
        "tasks": pa.array([[f"task {number % TASKS}"] for number in range(episodes)]),
        "length": np.full(episodes, FRAMES),
        "data/chunk_index": np.zeros(episodes, np.int64),
        "data/file_index": numbers // PER_FILE,
        "dataset_from_index": numbers * FRAMES,
        "dataset_to_index": (numbers + 1) * FRAMES,
    }
    for camera in cameras:
        files, within = numbers // PER_VIDEO, numbers % PER_VIDEO
        table |= {f"videos/{camera}/chunk_index": np.zeros(episodes, np.int64), f"videos/{camera}/file_index": files}
        table |= {
            f"videos/{camera}/{end}_timestamp": (within + i) * FRAMES / FPS for i, end in enumerate(("from", "to"))
        }
        for file in range(int(files[-1]) + 1):
            path = folder / f"videos/{camera}/chunk-000/file-{file:03d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    for name, values in statistics().items():
        for key, value in values.items():
            flat = np.tile(np.asarray(value, np.float64), episodes)
            offsets = np.arange(episodes + 1, dtype=np.int32) * len(value)
            table[f"stats/{name}/{key}"] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
    place = folder / "meta/episodes/chunk-000/file-000.parquet"
    place.parent.mkdir(parents=True)
    pq.write_table(pa.table(table), place)
    tasks = {"task_index": np.arange(TASKS), "task": [f"task {number}" for number in range(TASKS)]}
    pq.write_table(pa.table(tasks), folder / "meta/tasks.parquet")
    (folder / "meta/stats.json").write_text(json.dumps(statistics()))
    (folder / "meta/info.json").write_text(json.dumps(info("v3.0", episodes, cameras)))


def write_v2(folder: Path, episodes: int) -> None:
    """Write version 2.1, a data file per episode."""
    generator = np.random.default_rng(0)
    (folder / "meta").mkdir(parents=True)
    for chunk in range(0, episodes, 1000):
        path = folder / f"data/chunk-{chunk // 1000:03d}"
        path.mkdir(parents=True)
        count = min(1000, episodes - chunk)
        table = frames(chunk, count, generator)
        for i in range(count):
            pq.write_table(table.slice(i * FRAMES, FRAMES), path / f"episode_{chunk + i:06d}.parquet")
    lines = {
        "episodes": [{"episode_index": i, "tasks": [f"task {i % TASKS}"], "length": FRAMES} for i in range(episodes)],
        "episodes_stats": [{"episode_index": i, "stats": statistics()} for i in range(episodes)],
        "tasks": [{"task_index": i, "task": f"task {i}"} for i in range(TASKS)],
    }
    for name, rows in lines.items():
        (folder / f"meta/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "meta/info.json").write_text(json.dumps(info("v2.1", episodes, ())))


# --- what is measured, each in a process of its own -----------------------------------------------------------


def memory() -> dict[str, float]:
    """Return the process's memory now and at its peak [MB]."""
    pages = {"Rss": 0, "Private_Clean": 0, "Private_Dirty": 0}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name = line.partition(":")[0]
        if name in pages:
            pages[name] = int(line.split()[1])
    return {
        "rss": pages["Rss"] / 1e3 * 1.024,
        "uss": (pages["Private_Clean"] + pages["Private_Dirty"]) / 1e3 * 1.024,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 * 1.024,
    }


def memory_of_worker(samples: list) -> dict[str, float]:
    """Stand in for a collate function: tell the memory of the worker that it runs in."""
    return memory()


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Return the seconds and the processor's seconds of one call, and the memory after it."""
    wall, cpu = time.perf_counter(), time.process_time()
    kept = work()
    result = {"s": time.perf_counter() - wall, "cpu": time.process_time() - cpu} | memory()
    del kept
    return result


def probe(name: str, folder: Path) -> dict[str, dict[str, float]]:
    """Measure in this process, which has done nothing else: what is measured → its figures."""
    from manipulators import LeRobotDataset, convert_dataset
    from manipulators.data.identity import identity_of

    if name == "convert":
        output = folder.with_name(folder.name + "-converted")
        return {name: timed(lambda: convert_dataset(folder, output, progress=False))}
    opened = []
    result = {name: timed(lambda: opened.append(LeRobotDataset(folder, action_horizon=16)))}
    dataset = opened[0]
    if name != "again" or dataset.camera_names:
        return result
    result["worker"] = memory_in_worker(dataset)
    result["statistics"] = timed(lambda: dataset.statistics)
    generator = np.random.default_rng(1)
    batches = generator.integers(0, len(dataset), (2 * BATCHES, BATCH))
    for batch in batches[:BATCHES]:
        dataset.__getitems__(batch)
    result["samples"] = timed(lambda: [dataset.__getitems__(batch) for batch in batches[BATCHES:]])
    result["samples"]["us"] = result["samples"]["cpu"] / BATCH / BATCHES * 1e6
    batches = generator.integers(0, len(dataset), (BATCHES, BATCH))
    numbers = timed(lambda: [dataset.numbers("action", batch) for batch in batches])
    result["samples"]["numbers_us"] = numbers["cpu"] / batches.size * 1e6
    result["identity"] = timed(lambda: identity_of(dataset))
    return result


def memory_in_worker(dataset: object) -> dict[str, float]:
    """Return the memory of a spawned worker of a DataLoader that has read its first batch."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        dataset, batch_size=BATCH, num_workers=1, multiprocessing_context="spawn", collate_fn=memory_of_worker
    )  # fmt: skip
    return next(iter(loader))


def measured(name: str, folder: Path, cache: Path, package: Path | None) -> dict[str, dict[str, float]]:
    """Measure in a fresh process of one version."""
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if package is not None:
        environment["PYTHONPATH"] = str(package)
    command = [sys.executable, __file__, "--probe", name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    shutil.rmtree(folder.with_name(folder.name + "-converted"), ignore_errors=True)
    if done.returncode:
        raise RuntimeError(f"{name} of {folder} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# What the table shows: title, and how its figures are written. Seconds are the processor's.
ROWS = {
    "first": ("first opening", "{cpu:.1f} s, peak {peak:.0f} MB"),
    "again": ("opening again", "{cpu:.2f} s, RSS {rss:.0f} MB, USS {uss:.0f} MB"),
    "worker": ("spawned worker", "RSS {rss:.0f} MB, USS {uss:.0f} MB"),
    "statistics": ("reading the statistics", "{cpu:.2f} s"),
    "samples": ("random samples", "{us:.0f} µs each, `numbers()` {numbers_us:.1f} µs per row, then RSS {rss:.0f} MB"),
    "identity": ("a training's digest", "{cpu:.1f} s, peak so far {peak:.0f} MB"),
    "convert": ("`convert_dataset`", "{cpu:.0f} s, peak {peak:.0f} MB"),
}
PROBES = ("first", "again", "convert")  # a process each


def cases(sizes: Sequence[int]) -> list[tuple[str, int, Callable[[Path], None], tuple[str, ...]]]:
    """Return every dataset: its layout, its episodes, what writes it, and what is measured of it."""
    found = [("v3.0", n, partial(write_v3, episodes=n), PROBES) for n in sizes]
    found.append(("v3.0, 2 cameras", sizes[-1], partial(write_v3, episodes=sizes[-1], cameras=CAMERAS), PROBES[:2]))
    return found + [("v2.1", n, partial(write_v2, episodes=n), PROBES) for n in sizes[:2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/scale"))
    parser.add_argument("--before", type=Path, help="a folder that holds another version as `manipulators`")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument(
        "--skip", nargs="*", default=["before:convert:v3.0:100000"], help="version:probe:layout:episodes"
    )
    parser.add_argument("--probe", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        print(json.dumps(probe(arguments.probe[0], Path(arguments.probe[1]))))
        return
    versions = {"after": None} if arguments.before is None else {"before": arguments.before, "after": None}
    lines = ["| dataset | episodes | " + " | ".join(["", *versions]) + " |", "|---" * (3 + len(versions)) + "|"]
    record = []
    for number, (layout, episodes, write, probes) in enumerate(cases(arguments.sizes)):
        folder = arguments.output.resolve() / f"dataset-{number}"
        wanted = [(p, v) for p in probes for v in versions if f"{v}:{p}:{layout}:{episodes}" not in arguments.skip]
        if not wanted:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        write(folder)
        found: dict[str, dict[str, str]] = {}
        for name, version in wanted:
            cache = folder.with_name(f"cache-{number}-{version}")
            for what, figures in measured(name, folder, cache, versions[version]).items():
                found.setdefault(what, {})[version] = ROWS[what][1].format(**figures)
                record.append({"layout": layout, "episodes": episodes, "what": what, "version": version} | figures)
        for what, cells in found.items():
            shown = " | ".join(cells.get(version, "not run") for version in versions)
            lines.append(f"| {layout} | {episodes:,} | {ROWS[what][0]} | {shown} |")
            print(lines[-1], file=sys.stderr, flush=True)
        for path in arguments.output.glob(f"*-{number}*"):
            shutil.rmtree(path, ignore_errors=True)
    (arguments.output / "scale.json").write_text(json.dumps(record, indent=1))
    (arguments.output / "scale.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
