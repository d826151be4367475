"""The commands of `manipulators dataset`: merge | split | select | retask | stats | push.

Heavy imports wait for a command.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ._options import numbers, pairs
from .errors import InvalidConfigError

_EPISODES = "numbers of episodes, such as 0-3,7"


def add_dataset_commands(
    commands: argparse._SubParsersAction, shared: argparse.ArgumentParser, push: Callable[[argparse.Namespace], None]
) -> None:
    """Add `dataset` and its commands; `push` publishes a folder."""
    dataset = commands.add_parser(
        "dataset", help="edit LeRobot v3.0 datasets: merge, split, select, retask, stats, push; no video is re-encoded"
    )
    edits = dataset.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = edits.add_parser("merge", parents=[shared], help="join datasets of one robot, rate and set of features")
    command.add_argument("sources", nargs="+", metavar="SOURCE", help="datasets: folders or Hub ids, at least two")
    command.add_argument("--output", required=True, type=Path, help="folder of the new dataset")
    _add_features(command)
    command.add_argument("--robot-type", help="name of the robot, where the datasets have several for it")
    command.set_defaults(command=merge)

    command = edits.add_parser("split", parents=[shared], help="distribute the episodes over several datasets")
    command.add_argument("source", help="dataset: folder or Hub id")
    command.add_argument("--output", required=True, type=Path, help="folder of the new datasets, one per name")
    command.add_argument("--fractions", nargs="+", default=[], metavar="NAME=SHARE", help="such as train=0.9,val=0.1")
    command.add_argument("--episodes", nargs="+", default=[], metavar="NAME=0-9", help="which episodes instead")
    command.add_argument("--seed", type=int, default=0, help="of the draw of episodes (default: 0)")
    command.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    command.set_defaults(command=split)

    command = edits.add_parser("select", parents=[shared], help="keep some episodes and features")
    command.add_argument("source", help="dataset: folder or Hub id")
    command.add_argument("--output", required=True, type=Path, help="folder of the new dataset")
    command.add_argument("--episodes", nargs="+", metavar="0-3,7", help="to keep (default: all)")
    command.add_argument("--remove-episodes", nargs="+", metavar="0-3,7", help="to leave out")
    _add_features(command)
    command.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    command.set_defaults(command=select)

    command = edits.add_parser("retask", parents=[shared], help="give episodes other instructions")
    command.add_argument("source", help="folder of a dataset, which is changed; with --output also a Hub id")
    command.add_argument("--output", type=Path, help="folder of a changed copy (default: in place)")
    command.add_argument("--task", help="the instruction of all chosen episodes")
    command.add_argument("--map", nargs="+", default=[], metavar="OLD=NEW", help="new instructions for present ones")
    command.add_argument("--episodes", nargs="+", metavar="0-3,7", help=f"{_EPISODES} (default: all)")
    command.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    command.set_defaults(command=retask)

    command = edits.add_parser("stats", parents=[shared], help="compute the statistics anew and show them")
    command.add_argument("source", help="folder of a dataset; with --check also a Hub id")
    command.add_argument("--check", action="store_true", help="only compare those that are recorded with the data")
    command.add_argument("--features", nargs="+", metavar="NAME", help="of these features (default: all)")
    command.add_argument(
        "--tolerance-s", type=float, default=1e-4, help="how far a frame may be from its timestamp [s] (default: 1e-4)"
    )
    command.set_defaults(command=stats)

    command = edits.add_parser("push", parents=[shared], help="publish a dataset on the Hub, in one commit")
    add_push_arguments(command, "folder of a LeRobot dataset")
    command.set_defaults(command=push, only_datasets=True)


def _add_features(command: argparse.ArgumentParser) -> None:
    command.add_argument("--features", nargs="+", metavar="NAME", help="the features to keep (default: all)")
    command.add_argument("--drop", nargs="+", metavar="NAME", help="the features to leave out")
    command.add_argument("--rename-map", nargs="+", default=[], metavar="OLD=NEW", help="other names of features")


def add_push_arguments(command: argparse.ArgumentParser, folder: str) -> None:
    """Add what publishing takes; `folder` describes the first argument."""
    command.add_argument("folder", type=Path, help=folder)
    command.add_argument("repo_id", help="org/name; created when it does not exist")
    command.add_argument(
        "--private", action=argparse.BooleanOptionalAction, default=None, help="make a new repository private"
    )
    command.add_argument("--revision", help="branch (default: main)")
    command.add_argument("--message", help="of the commit")
    command.add_argument("--tag", action="append", dest="tags", help="for the card; may be repeated")


def merge(options: argparse.Namespace) -> None:
    """Merge datasets."""
    from .data.editing.merging import merge_datasets

    folder = merge_datasets(
        options.sources,
        options.output,
        features=options.features,
        drop=options.drop,
        rename_map=_rename_map(options),
        robot_type=options.robot_type,
    )
    print(f"{' and '.join(options.sources)} merged into {_described(folder)}")


def split(options: argparse.Namespace) -> None:
    """Split a dataset."""
    from .data.editing.selecting import split_dataset

    form = "train=0.9,val=0.1"
    words = [part for word in options.fractions for part in word.split(",") if part]
    fractions = pairs("--fractions", words, form)
    try:
        shares = fractions and {name: float(share) for name, share in fractions.items()}
    except ValueError as error:
        raise InvalidConfigError(
            f"--fractions {' '.join(options.fractions)}: {error}; write train=0.9,val=0.1"
        ) from error
    episodes = pairs("--episodes", options.episodes, "name=0-9")
    folders = split_dataset(
        options.source,
        options.output,
        fractions=shares,
        episodes=episodes and {name: numbers(f"--episodes {name}", [word]) for name, word in episodes.items()},
        seed=options.seed,
        revision=options.revision,
    )
    for folder in folders.values():
        print(_described(folder))


def select(options: argparse.Namespace) -> None:
    """Select episodes and features."""
    from .data.editing.selecting import select_from_dataset

    folder = select_from_dataset(
        options.source,
        options.output,
        episodes=_episodes("--episodes", options.episodes),
        remove_episodes=_episodes("--remove-episodes", options.remove_episodes),
        features=options.features,
        drop=options.drop,
        rename_map=_rename_map(options),
        revision=options.revision,
    )
    print(_described(folder))


def retask(options: argparse.Namespace) -> None:
    """Give episodes other instructions."""
    from .data.editing.retasking import retask_dataset

    folder = retask_dataset(
        options.source,
        options.output,
        task=options.task,
        tasks=pairs("--map", options.map, "'old instruction=new instruction'"),
        episodes=_episodes("--episodes", options.episodes),
        revision=options.revision,
    )
    print(_described(folder))


def stats(options: argparse.Namespace) -> None:
    """Compute or compare statistics."""
    from .data.editing.recomputing import check_statistics, recompute_statistics
    from .data.editing.tables import statistics_table

    compute = check_statistics if options.check else recompute_statistics
    statistics = compute(options.source, features=options.features, tolerance_s=options.tolerance_s)
    print(statistics_table(statistics))
    if options.check:
        print(f"The statistics of {options.source} are those of its data.")


def _episodes(option: str, words: list[str] | None) -> list[int] | None:
    return None if words is None else numbers(option, words)


def _rename_map(options: argparse.Namespace) -> dict[str, str] | None:
    return pairs("--rename-map", options.rename_map, "old_name=new_name")


def _described(folder: Path) -> str:
    from .data.layouts.reader import load_metadata

    metadata = load_metadata(folder)
    count = len(metadata.episode_numbers)
    return (
        f"{folder}: {count} episode{'s' * (count != 1)}, {int(metadata.episode_ends[-1])} frames, instructions: "
        + ", ".join(map(repr, list(metadata.tasks.values())[:8]))
        + (f", … ({len(metadata.tasks)} in all)" if len(metadata.tasks) > 8 else "")
    )
