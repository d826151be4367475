"""Run commands in two processes by torch's own launcher, one launch after the other, from modules imported once.

    python launches.py FOLDER

Writes FOLDER/launches.json: by launch, its exit status, and what each process printed. A fault is made in one of the
processes before a step of its training.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

RECIPE = """
policy: act_policy
plugins: [toy_line]
inputs: [observation.state]
data: {dataset: demonstrations, record: {environment: toy_line/right, episodes: 3}}
config: {chunk_size: 4, n_action_steps: 4, dim_model: 16, n_heads: 2, dim_feedforward: 32, n_encoder_layers: 1,
  n_vae_encoder_layers: 1, latent_dim: 4, dropout: 0.1}
training: {max_steps: 8, save_steps: 2, per_device_train_batch_size: 4, learning_rate: 1e-3, logging_steps: 1,
  ema_decay: 0.5, disable_tqdm: true}
evaluation: {environment: toy_line/right, episodes: 2, seed: 100}
output: whole
"""
TRAIN = ["train", "tiny.yaml"]
STEP = 5  # before which the faults come


def command(arguments, fault):
    """Run a command in one of the processes."""
    import torch

    from manipulators import PolicyTrainer
    from manipulators.cli import main
    from manipulators.errors import InvalidConfigError

    rank, kind = fault or (-1, "")
    step = PolicyTrainer.training_step

    def faulty(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 0:
            weights = sum(float(parameter.detach().sum()) for parameter in model.parameters())
            with torch.random.fork_rng():
                seen = {"weights": weights, "drawn": torch.rand(1).item(), "state": inputs["state"].flatten().tolist()}
            Path(self.args.output_dir, f"seen-{self.args.process_index}.json").write_text(json.dumps(seen))
        if self.state.global_step == STEP and self.args.process_index == rank:
            if kind == "error":
                raise InvalidConfigError("This process was made to fail.")
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            Path("stalled").touch()
            time.sleep(60)
        return step(self, model, inputs, *args, **kwargs)

    PolicyTrainer.training_step = faulty
    sys.exit(main(arguments))


def launch(name, arguments, fault=None, stopped=False, static=False):
    """Return the exit status of a launch and what its processes printed; `static` is how accelerate launches."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=name,
        rdzv_backend="static" if static else "c10d",
        rdzv_endpoint=f"localhost:{free_port() if static else 0}",
        rdzv_configs={"rank": 0} if static else {},
        max_restarts=0,
        monitor_interval=0.1,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=f"logs-{name}", redirects=Std.ALL),
    )
    if stopped:
        threading.Thread(target=stop_once_stalled, daemon=True).start()
    began, status = time.monotonic(), 0
    try:
        elastic_launch(config, command)(arguments, fault)
    except (ChildFailedError, SignalException):
        status = 1
    printed = {
        stream: [path.read_text() for path in sorted(Path(f"logs-{name}").glob(f"*/attempt_0/?/{stream}.log"))]
        for stream in ("stdout", "stderr")
    }
    return {"status": status, "seconds": time.monotonic() - began} | printed


def free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def stop_once_stalled():
    while not Path("stalled").exists():
        time.sleep(0.05)
    time.sleep(0.5)  # the other process waits for this one's gradients
    os.kill(os.getpid(), signal.SIGTERM)


def main(folder):
    """Launch everything in a folder."""
    os.chdir(folder)
    Path("tiny.yaml").write_text(RECIPE)
    Path("broken.yaml").write_text(RECIPE.replace("chunk_size", "chunk_sise"))
    results = {}

    def record(name, *args, **kwargs):
        results[name] = launch(name, *args, **kwargs)

    record("whole", TRAIN, static=True)
    record("again", TRAIN, static=True)
    record("broken", ["train", "broken.yaml", "--output", "broken"])
    record("eval", ["eval", "whole", "--plugin", "toy_line", "--env", "toy_line/right"])
    record("error", [*TRAIN, "--output", "error"], (1, "error"))
    record("killed", [*TRAIN, "--output", "killed"], (1, "kill"))
    record("resumed", [*TRAIN, "--output", "killed", "--resume"])
    record("stopped", [*TRAIN, "--output", "stopped"], (1, "stall"), stopped=True)
    Path("launches.json").write_text(json.dumps(results))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent / "external" / "toy-robot"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (sys.path[0], os.environ.get("PYTHONPATH"))))
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # which every process sets before it imports torch
    modules = [
        "manipulators.training.runs.run",
        "manipulators.training.ema",
        "manipulators.cli",
        "toy_line",
        "matplotlib.pyplot",
    ]
    multiprocessing.set_forkserver_preload(modules)
    with contextlib.redirect_stdout(sys.stderr):
        main(sys.argv[1])
