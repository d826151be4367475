"""A strategy that is asked for is used or refused by name; the shipped files of accelerate are valid."""

from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

import manipulators
from manipulators import PolicyTrainingArguments
from manipulators._processes import Processes, launched
from manipulators.errors import InvalidConfigError, LaunchError
from manipulators.training.processes import seed_process

CONFIGS = Path(manipulators.__file__).parent / "recipes" / "accelerate"


@pytest.mark.parametrize(
    ("variable", "fields", "message"),
    [
        ("ACCELERATE_USE_FSDP", {"use_cpu": True}, "FSDP needs GPUs.*would train with DDP instead"),
        (None, {"use_cpu": True, "fsdp": "full_shard"}, "FSDP needs GPUs"),
        ("ACCELERATE_USE_DEEPSPEED", {}, "DeepSpeed is not installed: pip install deepspeed"),
        (None, {"deepspeed": {"zero_optimization": {"stage": 2}}}, "DeepSpeed is not installed"),
    ],
)
def test_a_strategy_that_would_not_be_honoured_is_refused(tmp_path, monkeypatch, variable, fields, message):
    if variable is not None:
        monkeypatch.setenv(variable, "true")
    with pytest.raises(InvalidConfigError, match=message):
        PolicyTrainingArguments(str(tmp_path), **fields)


def test_fsdp_that_accelerate_leaves_out_is_refused(
    make_policy, make_processor, make_dataset, make_arguments, monkeypatch
):
    """Such as in a notebook, where the variable is set after the arguments were made."""
    from manipulators import PolicyTrainer

    arguments, policy = make_arguments(), make_policy()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(InvalidConfigError, match="FSDP is configured, and accelerate does not use it for NO"):
        PolicyTrainer(policy, arguments, make_processor(policy), train_dataset=make_dataset())


def test_processes_that_do_not_find_each_other_are_refused(tmp_path, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched().count == 2
    with pytest.raises(LaunchError, match=r"process 0 of 2, but they do not find each other.*MASTER_ADDR"):
        Processes(0, 2).connect()


def test_processes_that_would_train_each_by_itself_are_refused(tmp_path, monkeypatch):
    """MPI and others may set no LOCAL_RANK, without which accelerate takes each process for the only one."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("manipulators.training.processes.launched", lambda: Processes(0, 2))
    with pytest.raises(InvalidConfigError, match="2 processes were launched, and accelerate sees 1"):
        PolicyTrainingArguments(str(tmp_path))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_of_accelerate_are_valid(path):
    config = load_config_from_file(str(path))
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert config.num_processes == (16 if path.stem.endswith("_nodes") else 2)
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}[path.stem.split("_")[0]]
    assert config.distributed_type.value == kind
    given = ["--config_file", str(path), "-m", "manipulators", "train", "act_metaworld"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    assert (arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed) == (
        kind == "MULTI_GPU",
        kind == "FSDP",
        kind == "DEEPSPEED",
    )
    if kind == "FSDP":
        assert (arguments.fsdp_version, str(arguments.fsdp_cpu_ram_efficient_loading)) == (2, "False")
    if kind == "DEEPSPEED":
        assert arguments.zero_stage == int(path.stem[4])


def test_all_files_of_accelerate_are_there():
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names == {"ddp", "ddp_nodes", "fsdp2", "fsdp2_nodes", "zero2", "zero3"}


def test_a_process_without_a_saved_random_state_draws_its_own(make_arguments, tmp_path):
    def drawn(rank, step, checkpoint=None):
        arguments = make_arguments()
        arguments.distributed_state = type("State", (), {"process_index": rank, "num_processes": 2})()
        seed_process(arguments, checkpoint, step)
        return torch.rand(1).item()

    values = [drawn(0, 0), drawn(1, 0), drawn(0, 10), drawn(1, 10, str(tmp_path))]
    assert len(set(values)) == 4
    (tmp_path / "rng_state_1.pth").touch()
    torch.manual_seed(7)
    after = torch.rand(1).item()
    torch.manual_seed(7)
    assert drawn(1, 10, str(tmp_path)) == after  # the checkpoint's is loaded later
