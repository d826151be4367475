"""All that a GPU is needed for, in few minutes: equal numbers, speed, memory of training, in order of worth.

    python benchmarks/gpu_suite.py --minutes 8 --golden ../shared/golden --output outputs/benchmarks
    python benchmarks/gpu_suite.py --only 'π0, 3 cameras*' --rounds 200
    python benchmarks/gpu_suite.py --recipes                                       # those for one GPU of 24 GB
    python benchmarks/gpu_suite.py --size tiny --device cpu --dtype float32        # tries every row but CUDA graphs

A row is printed as soon as it is measured, and added to `gpu_suite.md`, a table, and to `gpu_suite.jsonl`, which also
has every single measurement. A row that fails leaves its traceback in `errors/`, and the next one follows; one that is
not expected to fit into the time that is left is skipped. `--list` shows all rows.
"""

from __future__ import annotations

import argparse
import faulthandler
import fnmatch
import gc
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from gpu_equality import compiled_rows, equality_rows, golden_rows
from gpu_rows import TOLERANCE, Row, Suite, run_rows
from gpu_speed import further_speed_rows, profile_rows, speed_rows
from gpu_training import further_training_rows, recorded_recipe_rows, training_rows
from networks import SIZES
from timing import machine

PACKAGES = ["torch", "transformers", "diffusers", "peft"]
GRACE = 20  # seconds behind the deadline in which the process ends whatever it does
HEADER = "| row | result | seconds | numbers |\n|---|---|---|---|\n"


def all_rows(on_gpu: bool) -> list[Row]:
    """Return all rows, in order of worth."""
    return [
        *equality_rows(),
        *golden_rows(),
        *speed_rows(on_gpu),
        *training_rows(),
        *profile_rows(on_gpu),
        *compiled_rows(on_gpu),
        *further_training_rows(),
        *further_speed_rows(on_gpu),
    ]


def begin(arguments: argparse.Namespace, device: torch.device) -> None:
    """Write the head of the results: what they depend on."""
    described = machine(PACKAGES) | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": arguments.dtype,
        "size": arguments.size,
    }
    about = " · ".join(f"{name} {value}" for name, value in described.items())
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "gpu_suite.md").write_text(f"{about}\n\n{HEADER}", encoding="utf-8")
    (arguments.output / "gpu_suite.jsonl").write_text(json.dumps(described) + "\n", encoding="utf-8")
    print(f"{about}\n\n{HEADER}", end="", flush=True)


def main() -> None:
    """Measure what was chosen and fits; exit with 1 where a row failed or is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="that all may take, imports left out")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", default=["*"], help="names of rows, * for any text")
    parser.add_argument(
        "--recipes", action="store_true", help="only the recipes for 24 GB, from random weights on recorded episodes"
    )
    parser.add_argument("--list", action="store_true", help="show the rows and the seconds each is expected to take")
    parser.add_argument("--size", choices=SIZES, default="published")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="bfloat16")
    parser.add_argument("--rounds", type=int, help="of a chunk; by default 30 on a GPU, 1 elsewhere")
    parser.add_argument("--steps", type=int, help="of an optimizer; by default 20 on a GPU, 1 elsewhere")
    parser.add_argument("--golden", type=Path, default=Path(__file__).parents[2] / "shared" / "golden")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    parser.add_argument("--first-row", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    seconds = arguments.seconds or 60 * arguments.minutes
    deadline = time.monotonic() + seconds
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    every = recorded_recipe_rows() if arguments.recipes else all_rows(on_gpu)
    rows = [row for row in every if any(fnmatch.fnmatchcase(row.name, p) for p in arguments.only)]
    if arguments.list:
        print("\n".join(f"{row.seconds:5.0f}  {row.name}" for row in rows))
        return
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True)
    # Numbers are compared in full float32; rows of speed are in the type that was asked for.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if not on_gpu:
        torch.set_num_threads(1)  # a dry run beside other programs: threads would wait for each other
    if not arguments.first_row:
        begin(arguments, device)
    suite = Suite(
        device=device,
        dtype=getattr(torch, arguments.dtype),
        size=arguments.size,
        rounds=arguments.rounds or (30 if on_gpu else 1),
        steps=arguments.steps or (20 if on_gpu else 1),
        golden=arguments.golden,
        output=arguments.output,
        folder=Path(tempfile.mkdtemp(prefix="gpu_suite")),
        deadline=deadline,
    )
    gc.collect()
    gc.freeze()  # what is imported stays: later collections, one before each timed call, need not look at it
    try:
        records = run_rows(suite, rows, arguments.first_row)
    finally:
        shutil.rmtree(suite.folder, ignore_errors=True)
    bad = [record["row"] for record in records if record["result"] in ("FAILED", "CHECK")]
    skipped = sum(record["result"] == "skipped" for record in records)
    summary = f"{len(records) - skipped} rows, {skipped} skipped, {len(bad)} not as they should be"
    print(f"\n{summary}{': ' * bool(bad)}{', '.join(bad)}", flush=True)
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
