"""The command line: record | train | eval | benchmark | convert | convert-dataset | dataset | card | push.

Heavy imports wait for a command.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from ._dataset_commands import add_dataset_commands, add_push_arguments
from ._interrupts import (
    clean_interrupts,
    ended,
    kept_by_any,
    kept_by_evaluation,
    kept_by_recording,
    kept_by_training,
    notes,
    say_error,
    say_unexpected,
    say_what_is_kept,
)
from ._options import pairs
from ._processes import INTERRUPTED, Processes, is_lost_contact, launched
from ._version import __version__
from .errors import LaunchError, ManipulatorsError
from .plugins import load_plugins

ENVIRONMENT_HELP = "such as metaworld/pick-place-v3, or 'metaworld/pick-place-v3?camera=corner2' with a camera"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; an error of this library becomes one message and exit status 1, an interrupt status 130."""
    # Waiting threads sleep instead of spinning: with another program on the machine, spinning threads slowed the
    # training of small networks more than twentyfold. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Once imported, it says which faster kernels it would download.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    processes = launched()
    processes.quieten()
    options = argparse.Namespace(kept=kept_by_any, arguments=arguments)
    with clean_interrupts(options), processes.ending_together(lambda: say_what_is_kept(options, "")):
        try:
            return _run(arguments, options, processes)
        except SystemExit as end:
            if processes.count > 1:
                processes.leave(end.code or 0)
            raise
        except KeyboardInterrupt as interrupt:
            note = " ".join(notes(interrupt))
            return ended(processes, INTERRUPTED, lambda: say_what_is_kept(options, note))


def _run(arguments: Sequence[str], options: argparse.Namespace, processes: Processes) -> int:
    """Run a command, of several processes together, and return its exit status."""
    try:
        _parse(arguments, options, processes)
        processes.connect()
        if options.plugins:
            load_plugins(options.plugins)
        options.command(options)
    except ManipulatorsError as error:
        return ended(processes, 1, functools.partial(say_error, error))
    except Exception as error:
        if processes.count == 1:
            raise
        patience = 0.5 if is_lost_contact(error) else 0.0  # of which another process may know more
        return ended(processes, 1, functools.partial(say_unexpected, error, options), patience)
    return 0


def _parse(arguments: Sequence[str], options: argparse.Namespace, processes: Processes) -> None:
    """Read the command and its options.

    Raises:
        LaunchError: several processes were launched for a command that runs in one.
    """
    parser = build_parser()
    shown = (sys.stdout, sys.stderr) if processes.is_main else (None, None)
    with redirect_stdout(shown[0]), redirect_stderr(shown[1]):
        _, rest = parser.parse_known_args(arguments, options)
        takes_fields = options.command in (evaluate, convert) and rest[:1] and _is_field(rest[0])
        may_override = options.command is train or takes_fields
        if rest and not may_override:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest, options.arguments = rest, arguments
    if processes.count > 1 and options.command is not train:
        raise LaunchError(
            f"manipulators {arguments[0]} runs in one process, and this is one of {processes.count}. Start it without "
            f"the launcher: {shlex.join(['manipulators', *arguments])}"
        )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="manipulators", description="Robot-manipulation policies: record, train, evaluate, convert, describe."
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(kept=kept_by_any)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--plugin",
        action="append",
        dest="plugins",
        default=[],
        metavar="MODULE",
        help="import this Python module first, which registers policies or simulators; may be repeated",
    )

    command = commands.add_parser(
        "record", parents=[shared], help="record a scripted expert's demonstrations in simulation"
    )
    command.add_argument(
        "--env", required=True, nargs="+", help=f"{ENVIRONMENT_HELP}; several for several instructions"
    )
    command.add_argument("--episodes", type=int, default=50, help="successful episodes to record (default: 50)")
    command.add_argument("--seed", type=int, default=0, help="seed of the first episode (default: 0)")
    command.add_argument("--horizon", type=int, help="steps after which an episode has failed")
    command.add_argument("--output", required=True, type=Path, help="folder of the new dataset")
    command.set_defaults(command=record, kept=kept_by_recording)

    command = commands.add_parser(
        "train",
        parents=[shared],
        add_help=False,
        help="train, evaluate and describe a policy by a recipe",
        description="Every value of the recipe can be overridden: --training.max_steps 500 --config.dim_model 256",
    )
    command.add_argument("-h", "--help", action=_TrainHelp, nargs=0, help="show this, and every field of a recipe")
    command.add_argument("recipe", help="name of a shipped recipe, such as act_metaworld, or a YAML file")
    command.add_argument("--output", help="folder of the new checkpoint (default: the recipe's)")
    command.add_argument(
        "--resume", action="store_true", help="continue from the last Trainer checkpoint in the output"
    )
    command.set_defaults(command=train, kept=kept_by_training, loaded=None)

    command = commands.add_parser(
        "eval",
        parents=[shared],
        help="measure a policy in closed loop",
        description="Fields of config and processor can be overridden: --config.n_action_steps 8",
    )
    command.add_argument("source", help="checkpoint: folder or Hub id, ours or LeRobot's")
    command.add_argument("--env", required=True, help=ENVIRONMENT_HELP)
    command.add_argument(
        "--episodes", type=int, default=50, help="episodes to run, on consecutive seeds (default: 50)"
    )
    command.add_argument("--seed", type=int, default=10_000, help="seed of the first episode (default: 10000)")
    command.add_argument("--seeds", type=int, nargs="+", help="of every episode, in place of --episodes and --seed")
    command.add_argument("--num-envs", type=int, default=10, help="environments that step together (default: 10)")
    command.add_argument("--horizon", type=int, help="steps after which an episode has failed")
    command.add_argument("--device", help="such as cpu or cuda (default: the first accelerator, else cpu)")
    command.add_argument("--dtype", help="of the weights, such as bfloat16 (default: as saved)")
    command.add_argument("--tokenizer", help="folder or Hub id of the policy's tokenizer, in place of its own")
    command.add_argument("--embodiment", help="the robot, where a checkpoint knows several")
    command.add_argument(
        "--camera-map", nargs="+", default=[], metavar="YOURS=POLICY", help="the environment's cameras → the policy's"
    )
    command.add_argument("--clamp-actions", action="store_true", help="keep actions inside the training range")
    command.add_argument(
        "--max-action-step",
        nargs="+",
        metavar="STEP",
        help="farthest that an action may be from the one before: 0.05 for all, one number each, or x=0.05 by name",
    )
    command.add_argument(
        "--observation-limit",
        type=float,
        metavar="RANGES",
        help="training ranges that a state may lie outside of its own (default: 100); inf for any number",
    )
    command.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    command.add_argument("--subfolder", help="of the folder or repository")
    command.add_argument("--task", help="the instruction (default: the environment's own)")
    command.add_argument("--output", type=Path, help="write the result to this JSON file")
    command.add_argument("--video", type=Path, help="film the first episodes into this .mp4, if a renderer works")
    command.set_defaults(command=evaluate, kept=kept_by_evaluation)

    command = commands.add_parser(
        "benchmark", parents=[shared], help="time a policy: processor, stages, decoding, and a whole chunk"
    )
    command.add_argument("source", help="checkpoint: folder or Hub id, ours or as another project published it")
    command.add_argument("--device", help="such as cpu or cuda (default: the first accelerator, else cpu)")
    command.add_argument("--dtype", help="of the weights, such as bfloat16 (default: as saved)")
    command.add_argument("--batch-size", type=int, default=1, help="observations per chunk (default: 1)")
    command.add_argument("--rounds", type=int, default=20, help="chunks that are counted (default: 20)")
    command.add_argument("--warmup", type=int, default=3, help="chunks before them that are not counted (default: 3)")
    command.add_argument("--num-steps", type=int, help="steps of sampling (default: the policy's)")
    command.add_argument("--fuse", action="store_true", help="join weights that read the same input")
    command.add_argument("--compile", action="store_true", help="compile every stage first")
    command.add_argument("--tokenizer", help="folder or Hub id of the policy's tokenizer, where its own is gated")
    command.add_argument("--output", type=Path, help="write every measurement to this JSON file")
    command.set_defaults(command=benchmark)

    command = commands.add_parser(
        "convert",
        parents=[shared],
        help="write another project's checkpoint in this library's format",
        description="Fields of config and processor can be overridden: --config.prompt_state_dim 0",
    )
    command.add_argument("source", help="published checkpoint: folder or Hub id")
    command.add_argument("output", type=Path, help="folder of the new checkpoint")
    command.add_argument("--tokenizer", help="folder or Hub id of the policy's tokenizer, where its own is gated")
    command.add_argument("--embodiment", help="the robot to convert for, where a checkpoint knows several")
    command.add_argument("--statistics", help="of a checkpoint without: a dataset, or a JSON file such as stats.json")
    command.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    command.add_argument("--subfolder", help="folder of the checkpoint in its repository")
    command.set_defaults(command=convert)

    command = commands.add_parser(
        "convert-dataset", parents=[shared], help="write a LeRobot dataset in version 3.0, with all statistics"
    )
    command.add_argument("source", help="dataset of version 2.0, 2.1 or 3.0: folder or Hub id")
    command.add_argument("output", type=Path, help="folder of the new dataset")
    command.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    command.add_argument("--features", nargs="+", help="the features to keep (default: all)")
    command.add_argument("--episodes", type=int, nargs="+", help="the numbers of the episodes to keep (default: all)")
    command.add_argument(
        "--tolerance-s", type=float, default=1e-4, help="how far a frame may be from its timestamp [s] (default: 1e-4)"
    )
    command.add_argument("--rename-map", nargs="+", default=[], metavar="OLD=NEW", help="other names of features")
    command.set_defaults(command=convert_dataset)

    add_dataset_commands(commands, shared, push)

    command = commands.add_parser("card", parents=[shared], help="write a checkpoint's model card, or check it")
    command.add_argument("folder", type=Path, help="checkpoint folder")
    command.add_argument("--repo-id", help="org/name under which it is published, for the card's examples")
    command.add_argument("--check", action="store_true", help="only list the problems of the card")
    command.set_defaults(command=card)

    command = commands.add_parser(
        "push", parents=[shared], help="publish a checkpoint, an adapter or a dataset on the Hub, in one commit"
    )
    add_push_arguments(command, "checkpoint folder, or folder of a LeRobot dataset")
    command.set_defaults(command=push, only_datasets=False)
    return parser


class _TrainHelp(argparse.Action):
    """Show the options of `train`, and the fields of the recipe in front of it, or of any."""

    def __call__(self, parser, namespace, values, option_string=None):
        from .training.runs.recipe import load_recipe
        from .training.runs.recipe_help import recipe_help

        source = getattr(namespace, "recipe", None)
        load_plugins(namespace.plugins)
        parser.print_help()
        print(f"\n{recipe_help(load_recipe(source) if source else None)}")
        parser.exit()


def record(options: argparse.Namespace) -> None:
    """Record demonstrations."""
    from .evaluation.demonstrations import record_demonstrations

    result = record_demonstrations(
        options.env, options.episodes, options.output, seed=options.seed, horizon=options.horizon
    )
    broken = f", {len(result.broken_seeds)} that ended in an error" if result.broken_seeds else ""
    resumed = f"; {result.resumed} of them had been recorded before" if result.resumed else ""
    print(
        f"{result.episodes} episodes ({result.frames} frames) in {options.output}; "
        f"{result.failures} failed ones left out{broken}{resumed}"
    )


def train(options: argparse.Namespace) -> None:
    """Run a recipe."""
    from .training.runs.recipe import load_recipe
    from .training.runs.run import command_line, run_recipe

    overrides = _overrides(options.rest)
    if options.output:
        overrides.append(("output", options.output))
    recipe = load_recipe(options.recipe, overrides)
    options.loaded = recipe
    folder = run_recipe(recipe, command=command_line(options.arguments), resume=options.resume)
    processes = launched()
    processes.part()
    if not processes.is_main:
        return
    print(f"\nPolicy, card and results: {folder}")
    if recipe.evaluation is not None:
        print(_result_line((folder / "evaluation.json").read_text(encoding="utf-8")))


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate a checkpoint."""
    import json

    from .evaluation.rollout import evaluate as run_evaluation
    from .inference.pipeline import PolicyPipeline

    names = ("dtype", "tokenizer", "embodiment", "revision", "subfolder")
    loading = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    pipeline = PolicyPipeline.from_pretrained(
        options.source,
        device=options.device,
        camera_map=pairs("--camera-map", options.camera_map, "your_camera=policy_camera"),
        clamp_actions=options.clamp_actions,
        max_action_step=_action_step(options.max_action_step),
        **_observation_limit(options.observation_limit),
        **loading | _fields(options.rest),
    )
    seeds = options.seeds or range(options.seed, options.seed + options.episodes)
    result = run_evaluation(
        pipeline,
        options.env,
        seeds,
        num_envs=options.num_envs,
        horizon=options.horizon,
        video=options.video,
        task=options.task,
        output=options.output,
    )
    if options.video and not result.video:
        print(result.video_note)
    print(_result_line(json.dumps(result.to_dict())))


def benchmark(options: argparse.Namespace) -> None:
    """Time a checkpoint."""
    from ._files import write_text
    from .inference.pipeline import PolicyPipeline
    from .inference.speed import measure_speed

    loading = {"tokenizer": options.tokenizer} if options.tokenizer else {}
    pipeline = PolicyPipeline.from_pretrained(options.source, device=options.device, dtype=options.dtype, **loading)
    if options.fuse:
        pipeline.policy.fuse()
    if options.compile:
        pipeline.policy.compile(batch_size=options.batch_size)
    speed = measure_speed(pipeline, options.rounds, options.warmup, options.batch_size, options.num_steps)
    if options.output:
        write_text(options.output, speed.to_json())
    print(speed.table())


def convert(options: argparse.Namespace) -> None:
    """Convert a published checkpoint."""
    from ._files import new_folder
    from .auto import load_policy_and_processor
    from .hub_cards.checkpoint_card import write_checkpoint_card

    names = ("tokenizer", "embodiment", "statistics", "revision", "subfolder")
    loading = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    with new_folder(options.output, f"a conversion of {options.source}") as folder:
        policy, processor = load_policy_and_processor(options.source, **loading | _fields(options.rest))
        policy.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_checkpoint_card(folder, base=options.source)
    print(f"{options.source} written to {options.output}")


def convert_dataset(options: argparse.Namespace) -> None:
    """Convert a dataset."""
    from .data.convert import convert_dataset as run_conversion

    run_conversion(
        options.source,
        options.output,
        revision=options.revision,
        features=options.features,
        episodes=options.episodes,
        tolerance_s=options.tolerance_s,
        rename_map=pairs("--rename-map", options.rename_map, "old_name=new_name"),
    )
    print(f"{options.source} written to {options.output}")


def card(options: argparse.Namespace) -> None:
    """Write or check a checkpoint's card."""
    from .errors import InvalidCardError
    from .hub_cards.checkpoint_card import write_checkpoint_card
    from .hub_cards.lint import lint_card

    if not options.check:
        print(write_checkpoint_card(options.folder, repo_id=options.repo_id))
        return
    path = options.folder / "README.md"
    if not path.is_file():
        raise InvalidCardError(f"{options.folder} has no README.md. Write it: manipulators card {options.folder}")
    problems = lint_card(path.read_text(encoding="utf-8"))
    if problems:
        raise InvalidCardError(f"{path}:\n" + "\n".join(f"- {problem}" for problem in problems))
    print(f"{path} is fit to publish: manipulators push {shlex.quote(str(options.folder))} org/name")


def push(options: argparse.Namespace) -> None:
    """Publish a checkpoint, an adapter or a dataset."""
    from .hub_cards.publish import INFO_FILE, publish_dataset, publish_folder

    is_dataset = (options.folder / INFO_FILE).is_file() or options.only_datasets
    if is_dataset:  # what cannot be read is not published
        from .data.dataset import LeRobotDataset

        LeRobotDataset(options.folder)
    else:
        from .modeling.loading import read_tensors, require_finite

        for path in sorted(options.folder.glob("*model*.safetensors")):
            require_finite(path, read_tensors(path, backend="mmap"))
    publish = publish_dataset if is_dataset else publish_folder
    url = publish(
        options.folder,
        options.repo_id,
        private=options.private,
        revision=options.revision,
        commit_message=options.message,
        tags=options.tags,
    )
    print(url)


def _action_step(words: Sequence[str] | None) -> float | list[float] | dict[str, float] | None:
    """Read one number, one for each dimension, or `name=number` for some."""
    from .errors import InvalidConfigError

    if not words:
        return None
    named = [word.rpartition("=") for word in words]
    try:
        steps = [float(number) for _, _, number in named]
    except ValueError as error:
        raise InvalidConfigError(
            f"--max-action-step {' '.join(words)}: {error}; write 0.05, or x=0.05 y=0.1"
        ) from error
    names = [name for name, _, _ in named if name]
    if names and len(names) < len(words):
        raise InvalidConfigError(f"--max-action-step {' '.join(words)} mixes numbers with and without a name.")
    if names:
        return dict(zip(names, steps, strict=True))
    return steps[0] if len(steps) == 1 else steps


def _observation_limit(limit: float | None) -> dict[str, float | None]:
    if limit is None:
        return {}
    return {"observation_limit": None if limit == float("inf") else limit}


def _is_field(word: str) -> bool:
    return word.startswith("--config.")


def _fields(rest: Sequence[str]) -> dict[str, object]:
    """Read `--config.field value`; the value is YAML."""
    import yaml

    from .configuration.typed_values import read_yaml
    from .errors import InvalidConfigError

    fields: dict[str, object] = {}
    for key, text in _overrides(rest):
        section, _, name = key.partition(".")
        if section != "config" or not name:
            raise InvalidConfigError(f"--{key} is no option here; fields are written --config.{name or key} value")
        try:
            fields[name] = read_yaml(text)
        except yaml.YAMLError as error:
            raise InvalidConfigError(f"--{key}: {text!r} is not valid YAML: {error}") from error
    return fields


def _overrides(rest: Sequence[str]) -> list[tuple[str, str]]:
    """Read `--section.field value` and `--section.field=value`."""
    from .errors import InvalidRecipeError

    pairs, words = [], iter(rest)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise InvalidRecipeError(f"{word!r} is not an override; write --section.field value")
        if not equals:
            value = next(words, None)
            if value is None:
                raise InvalidRecipeError(f"--{key} lacks its value")
        pairs.append((key, value))
    return pairs


def _result_line(evaluation: str) -> str:
    import json

    result = json.loads(evaluation)
    low, high = result["interval"]
    errors = f", {result['errors']} of which ended in an error" if result.get("errors") else ""
    return (
        f"{result['environment']}: success {result['success_rate']:.0%} of {result['episodes']} episodes{errors} "
        f"(95 % interval {low:.1%} to {high:.1%}), mean length {result['mean_length']:.1f} steps, "
        f"{result['milliseconds_per_action']:.2f} ms per action"
    )
