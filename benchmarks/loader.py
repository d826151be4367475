"""Training batches beside LeRobot's: the same datasets, samples and order, with 0, 2 and 4 workers.

    python benchmarks/loader.py --output outputs/benchmarks
    python benchmarks/loader.py --only '3 x 224x224, AV1' --workers 0 2 --rounds 3

Both sides are `LeRobotDataset` and torch's DataLoader, measured in turn with workers that stay; a round's batches are
the same random samples on both, and all batches of the first round are compared. Datasets are of version 3.0: twenty
episodes of 200 frames, three cameras. One has one video file per camera, as LeRobot records it; the others one per
episode and camera, as datasets of version 2 have, and as those of version 3.0 come to have when they grow.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait would count as work

import numpy as np
import psutil
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset as TheirDataset
from lerobot.utils.import_utils import get_safe_default_video_backend
from timing import machine
from torch.utils.data import DataLoader, Sampler

from manipulators import LeRobotDataset, LeRobotWriter

EPISODES, FRAMES, CAMERAS, JOINTS, CHUNK, FPS = 20, 200, 3, 14, 50, 30
BATCH, THREADS = 8, 2
SMALL = 1e-6  # MB, so that every episode begins a file
PACKAGES = ["torch", "lerobot", "av", "numpy"]


@dataclass(frozen=True)
class Recording:
    """Name a dataset: sizes of its pictures, codec, and where a video file ends [MB]."""

    name: str
    size: tuple[int, int]
    codec: str
    file_mb: float


RECORDINGS = [
    Recording("3 x 224x224, AV1", (224, 224), "av1", 200),
    Recording("3 x 224x224, AV1, 60 files", (224, 224), "av1", SMALL),
    Recording("3 x 480x640, AV1", (480, 640), "av1", 200),
    Recording("3 x 480x640, AV1, 60 files", (480, 640), "av1", SMALL),
    Recording("3 x 480x640, H.264, 60 files", (480, 640), "h264", SMALL),
]


@dataclass(frozen=True)
class Row:
    """Hold what one dataset and number of workers gave: seconds, of the clock and of the processor, per round."""

    recording: str
    workers: int
    samples: int  # of a round
    ours: list[float]
    theirs: list[float]
    our_cpu: list[float]
    their_cpu: list[float]

    def line(self) -> str:
        """Return the row of the Markdown table."""
        low, median, high = np.percentile(np.divide(self.theirs, self.ours), [25, 50, 75])
        cpu = np.median(np.divide(self.their_cpu, self.our_cpu))
        rates = [self.samples / np.median(side) for side in (self.ours, self.theirs)]
        cost = [1000 * np.median(side) / self.samples for side in (self.our_cpu, self.their_cpu)]
        return (
            f"| {self.recording} | {self.workers} | {rates[0]:.0f} | {rates[1]:.0f} | **{median:.2f}×** "
            f"({low:.2f}–{high:.2f}) | {cost[0]:.1f} | {cost[1]:.1f} | {cpu:.2f}× | {len(self.ours)} |"
        )


HEAD = (
    "| dataset | workers | manipulators [samples/s] | LeRobot [samples/s] | faster by (quartiles) "
    "| processor, ours [ms/sample] | theirs [ms/sample] | less by | rounds |\n|---|---|---|---|---|---|---|---|---|"
)


def write(root: Path, recording: Recording) -> None:
    """Write a dataset: textured scenes that drift, with settings as LeRobot's (a keyframe every second frame)."""
    random = np.random.default_rng(0)
    height, width = recording.size
    cameras = [f"observation.images.camera{i}" for i in range(CAMERAS)]
    features = {name: {"dtype": "video", "shape": [height, width, 3]} for name in cameras}
    features |= {name: {"dtype": "float32", "shape": [JOINTS]} for name in ("observation.state", "action")}
    coarse = torch.from_numpy(random.random((CAMERAS, 3, height // 8, width // 4), dtype=np.float32))
    scenes = torch.nn.functional.interpolate(coarse, size=(height, 2 * width), mode="bicubic")
    scenes = (scenes.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()  # (cameras, h, 2w, 3)
    with LeRobotWriter(root, FPS, features, codec=recording.codec, video_files_size_in_mb=recording.file_mb) as writer:
        for episode in range(EPISODES):
            for step in range(FRAMES):
                joints = random.standard_normal(JOINTS).astype(np.float32)
                left = (step + 7 * episode) % width
                frame = {name: scene[:, left : left + width] for name, scene in zip(cameras, scenes, strict=True)}
                writer.add_frame(frame | {"observation.state": joints, "action": joints}, task="drift")
            writer.end_episode()


class Given(Sampler[int]):
    """The samples of a round, which is set between rounds."""

    def __init__(self):
        self.order: list[int] = []

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def processor_seconds() -> float:
    """Return the processor time of this process and of the workers that are alive [s]."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def measure(root: Path, name: str, workers: int, rounds: int, count: int) -> Row:
    """Measure both loaders in turn; which of them begins changes from round to round."""
    windows = {"action": [step / FPS for step in range(CHUNK)]}
    datasets = {
        "ours": LeRobotDataset(root, action_horizon=CHUNK),
        "theirs": TheirDataset("local/benchmark", root=root, delta_timestamps=windows, return_uint8=True),
    }
    sampler, random = Given(), np.random.default_rng(workers)
    loaders = {
        side: DataLoader(
            dataset, batch_size=BATCH, sampler=sampler, num_workers=workers, persistent_workers=workers > 0
        )
        for side, dataset in datasets.items()
    }
    sampler.order = random.permutation(EPISODES * FRAMES)[:count].tolist()
    for ours, theirs in zip(loaders["ours"], loaders["theirs"], strict=True):
        for feature in ours.keys() & theirs.keys():
            same = ours[feature] == theirs[feature]
            if not (same if isinstance(same, bool) else bool(same.all())):
                raise SystemExit(f"{name}: {feature} differs between the two.")
    clock: dict[str, list[float]] = {"ours": [], "theirs": []}
    processor: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(rounds):
        sampler.order = random.permutation(EPISODES * FRAMES)[:count].tolist()
        for side in sorted(loaders, reverse=bool(number % 2)):
            began, used = time.perf_counter(), processor_seconds()
            for _ in loaders[side]:
                pass
            clock[side].append(time.perf_counter() - began)
            processor[side].append(processor_seconds() - used)
    return Row(name, workers, count, clock["ours"], clock["theirs"], processor["ours"], processor["theirs"])


def main() -> None:
    """Measure the chosen datasets, print the table, write it with the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [recording.name for recording in RECORDINGS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 4, 0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=160, help="of a round")
    parser.add_argument("--folder", type=Path, help="where the datasets are, or are written; by default temporary")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    described = machine(PACKAGES) | {"LeRobot's video decoder": get_safe_default_video_backend()}
    rows, lines = [], [HEAD]
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for recording in (recording for recording in RECORDINGS if recording.name in arguments.only):
            root = (arguments.folder or Path(temporary)) / recording.name.replace(" ", "-").replace(",", "")
            if not root.is_dir():
                write(root, recording)
            bytes_of = {
                kind: sum(path.stat().st_size for path in root.glob(pattern)) / (EPISODES * FRAMES)
                for kind, pattern in (("video", "videos/**/*.mp4"), ("numbers", "data/**/*.parquet"))
            }
            for workers in arguments.workers:
                row = measure(root, recording.name, workers, arguments.rounds, arguments.samples)
                rows.append(asdict(row))
                lines.append(row.line())
                print(lines[-1], flush=True)
            lines.append("")
            print(
                f"{recording.name}: {bytes_of['video']:.0f} + {bytes_of['numbers']:.0f} bytes per sample", flush=True
            )
            rows[-1]["bytes_per_sample"] = bytes_of
    lines = [line for line in lines if line] + ["", " · ".join(f"{name} {value}" for name, value in described.items())]
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "loader.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (arguments.output / "loader.json").write_text(json.dumps({"machine": described, "rows": rows}, indent=2) + "\n")
    print("\n" + lines[-1])


if __name__ == "__main__":
    main()
