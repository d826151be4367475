"""Every error this library raises: what was given, what was expected, what exists, the line that fixes it."""

from __future__ import annotations

import difflib
import socket
from collections.abc import Iterable, Mapping


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return `Did you mean 'x'?` for the closest candidate, or a list of what exists."""
    candidates = sorted(candidates)
    close = difflib.get_close_matches(name, candidates, n=3, cutoff=0.6)
    if close:
        return "Did you mean " + " or ".join(repr(match) for match in close) + "?"
    if not candidates:
        return "There are none."
    shown = ", ".join(candidates[:12]) + (f", … ({len(candidates)} in all)" if len(candidates) > 12 else "")
    return f"Available: {shown}."


class ManipulatorsError(Exception):
    """Base class: `except ManipulatorsError` catches everything this library raises on purpose."""


def add_note(error: BaseException, note: str) -> None:
    """Say more about an error on its way; the command line shows it, and tracebacks do since Python 3.11."""
    if note:
        error.__notes__ = [*getattr(error, "__notes__", ()), note]


# --- configuration ----------------------------------------------------------------------------------------


class InvalidConfigError(ManipulatorsError, ValueError):
    """A configuration value, or a combination of values, that no policy can be built from."""


class UnknownConfigFieldError(ManipulatorsError, AttributeError, TypeError):
    """A configuration field that does not exist."""

    def __init__(self, config_name: str, field: str, known: Iterable[str]):
        super().__init__(f"{config_name} has no field {field!r}. {nearest(field, known)}")


# --- registry ---------------------------------------------------------------------------------------------


class UnknownPolicyError(ManipulatorsError, KeyError):
    """A model type, or a checkpoint of one, that no registered policy claims."""

    def __str__(self) -> str:  # KeyError would print the repr of its argument
        return self.args[0]


class PluginError(ManipulatorsError, ImportError):
    """A plugin that cannot be loaded: a module named by the user, or an entry point of an installed package."""

    def __init__(self, name: str, reason: BaseException, value: str | None = None, package: str | None = None):
        cause = f"{type(reason).__name__}: {reason}"
        if value is None:
            remedy = (
                "Name a Python module, as in --plugin my_robot: it must be installed, in the working directory, or on "
                "PYTHONPATH."
            )
            super().__init__(f"The plugin {name!r} cannot be imported ({cause}). {remedy}")
        else:
            package = package or name
            super().__init__(
                f"The plugin {name!r} of the installed package {package!r} cannot be loaded from {value!r} ({cause}). "
                f"Repair the package, or remove it: pip uninstall {package}"
            )


# --- checkpoints ------------------------------------------------------------------------------------------


class CheckpointError(ManipulatorsError):
    """Base class of everything that can be wrong with a checkpoint folder."""


class WeightsMismatchError(CheckpointError, RuntimeError):
    """Weights that are missing, unexpected or of another shape than the configuration asks for."""

    def __init__(
        self,
        source: str,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        mismatched: Iterable[tuple[str, tuple, tuple]] = (),
    ):
        self.missing, self.unexpected = sorted(missing), sorted(unexpected)
        self.mismatched = sorted((name, tuple(found), tuple(expected)) for name, found, expected in mismatched)
        lines = [f"The weights in {source!r} do not fit the policy that its configuration describes:"]
        lines += _listed(self.missing, "missing", lambda name: f"{name} ({_hint(name, self.unexpected)})")
        lines += _listed(self.unexpected, "unexpected", lambda name: f"{name} ({_hint(name, self.missing)})")
        lines += _listed(
            self.mismatched, "of another shape", lambda row: f"{row[0]}: found {row[1]}, expected {row[2]}"
        )
        lines.append("Load a complete checkpoint, or pass allow_partial=True to accept randomly filled weights.")
        super().__init__("\n".join(lines))


class WeightsValueError(CheckpointError, ValueError):
    """Weights that are no numbers a network can compute with: NaN, infinity, or of a type that holds no fractions."""

    def __init__(self, source: object, not_finite: Iterable[str] = (), of_type: Iterable[tuple[str, str]] = ()):
        self.not_finite, self.of_type = sorted(not_finite), sorted((name, str(kind)) for name, kind in of_type)
        lines = [f"The weights in {str(source)!r} cannot be computed with:"]
        lines += _listed(self.not_finite, "with NaN or infinity", str)
        lines += _listed(self.of_type, "of a type that is not that of weights", lambda row: f"{row[0]}: {row[1]}")
        lines.append(
            "Download the checkpoint again, or take one that was saved before training diverged. Weights are float32, "
            "bfloat16 or float16; quantise them when loading, with quantization_config=."
        )
        super().__init__("\n".join(lines))


def _hint(name: str, others: list[str]) -> str:
    close = difflib.get_close_matches(name, others, n=1, cutoff=0.6)
    return f"nearest on the other side: {close[0]}" if close else "nothing similar on the other side"


def _listed(rows: list, title: str, describe, limit: int = 8) -> list[str]:
    if not rows:
        return []
    more = [f"    … and {len(rows) - limit} more"] if len(rows) > limit else []
    return [f"  {len(rows)} {title}:"] + [f"    {describe(row)}" for row in rows[:limit]] + more


class FusedPolicyError(ManipulatorsError, RuntimeError):
    """A policy cannot be fused as it is, or is fused and can no longer do what was asked."""


class InferenceOnlyError(ManipulatorsError, RuntimeError):
    """A policy in training mode was asked for what only inference has."""


class BaseMismatchError(CheckpointError, ValueError):
    """An adapter whose base is not the one it was trained on."""

    def __init__(self, adapter: str, base: str, recorded: str):
        super().__init__(
            f"The weights of {base!r} are not those that the adapter in {adapter!r} was trained on (then: "
            f"{recorded!r}). On another base it would act at random. Pass base=folder_or_id of the right one, in the "
            f"same dtype."
        )


class CorruptFileError(CheckpointError, OSError):
    """A file that exists but cannot be read as what its name says."""

    def __init__(self, path: object, expected: str, reason: object):
        super().__init__(f"{path} is not a readable {expected}: {reason}. Download or write it again.")


class MissingFileError(CheckpointError, FileNotFoundError):
    """A checkpoint folder or repository without a file it needs."""


class ConflictingWeightsError(CheckpointError, ValueError):
    """A folder with two sets of weights, of which only one can be meant."""

    def __init__(self, folder: object, names: Iterable[str]):
        super().__init__(
            f"{folder} holds two sets of weights: {' and '.join(names)}. Remove the one that is not meant; "
            f"save_pretrained leaves one set."
        )


class OutputExistsError(ManipulatorsError, FileExistsError):
    """An output folder that already holds something: nothing is overwritten silently."""

    def __init__(self, path: object, remedy: str = ""):
        words = f"{path} already exists. {remedy} Choose another folder, or remove it first: rm -r {path}"
        super().__init__(words.replace("  ", " "))


class FolderInUseError(ManipulatorsError, RuntimeError):
    """An output that another run writes at this moment, or did when its computer was cut off."""

    def __init__(self, path: object, lock: object, holder: Mapping[str, object], in_this_process: bool):
        self.holder = dict(holder)
        since = f" since {holder['since']}" if holder.get("since") else ""
        pid, host = holder.get("pid"), holder.get("host")
        if in_this_process:
            who, remedy = "in this process itself", "Close the first one, or choose another folder."
        elif not holder:
            who, remedy = "of which nothing is known yet", "Try again in a moment, or choose another folder."
        elif host == socket.gethostname():
            who = f"process {pid} on this computer"
            remedy = f"Wait until it has ended, stop it (kill -INT {pid}), or choose another folder."
        else:
            who = f"process {pid} on the computer {host!r}"
            remedy = f"If no such process runs there any more, remove its lock: rm {lock}"
        purpose = holder.get("purpose", "another run")
        super().__init__(f"{path} is in use by {purpose} ({who}{since}). {remedy}")


class DiskError(ManipulatorsError, OSError):
    """A disk that does not take what is written: it fails, or a limit on the size of files is reached."""


class ReadOnlyError(DiskError, PermissionError):
    """A disk that is read-only, or a folder that this user may not write to."""


class PublishingError(ManipulatorsError, OSError):
    """A repository that the Hub does not let this account write to, or a Hub that cannot be reached."""

    def __init__(self, repo_id: str, reason: object):
        super().__init__(
            f"{repo_id} could not be published: {reason} Log in with a token that may write there: hf auth login"
        )


# --- cards ------------------------------------------------------------------------------------------------


class CardError(ManipulatorsError, ValueError):
    """Base class of everything that can be wrong with a model card's content."""


class InvalidCardError(CardError):
    """Values that a card cannot state: impossible, contradicting each other, or of the wrong width."""


class NothingToDrawError(CardError):
    """A training log without a single finite loss."""

    def __init__(self, entries: int):
        super().__init__(
            f"The log has {entries} entries and none with a finite `loss` and a `step`, so there is no learning "
            f"curve to draw. Pass the log of a run with logging_steps > 0: trainer.state.log_history."
        )


# --- evaluation -------------------------------------------------------------------------------------------


class EvaluationError(ManipulatorsError):
    """Base class of everything that can go wrong around environments, demonstrations and rollouts."""


class InvalidEvaluationError(EvaluationError, ValueError):
    """Arguments that no rollout can be run with: no seeds, a horizon below one, an impossible count."""


class DifferentEvaluationError(EvaluationError, ValueError):
    """A file with finished episodes of another evaluation than the one that is to go on there."""

    def __init__(self, path: object, episodes: int, differences: Mapping[str, tuple[object, object]]):
        super().__init__(
            f"{path} holds {episodes} finished episodes of another evaluation: {_differences(differences)}. Evaluate "
            f"with what they have, choose another output, or remove them: rm {path}"
        )


class UnknownEnvironmentError(EvaluationError, LookupError):
    """An environment name whose family or task nobody registered."""

    def __init__(self, name: str, problem: str, known: Iterable[str]):
        super().__init__(
            f"There is no environment {name!r}: {problem} Names are <family>/<task>[?option=value]. "
            f"{nearest(name, known)}\n"
            'Add your own with register_environment("family", factory), in a module that --plugin names.'
        )


class InvalidEnvironmentError(EvaluationError, TypeError):
    """An environment that does not speak this library's names: observation, specification or success."""


class MissingSimulatorError(EvaluationError, ImportError):
    """A simulator that is not installed, or cannot be imported."""

    def __init__(self, simulator: str, reason: object):
        super().__init__(
            f"{simulator} cannot be imported ({reason}). Simulators are an extra; install it:\n"
            'pip install "manipulators[sim]"'
        )


class MissingRendererError(EvaluationError, RuntimeError):
    """A machine on which nothing draws pictures without a display."""

    remedy = "On Debian or Ubuntu: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri (or libosmesa6)"

    def __init__(self, failures: Mapping[str, str]):
        tried = "; ".join(f"{platform}: {reason}" for platform, reason in failures.items())
        super().__init__(
            f"No OpenGL renderer works here, so no camera can be simulated. Tried {tried}.\n{self.remedy}"
        )


class InvalidActionError(EvaluationError, ValueError):
    """An action that must not reach a robot: NaN, infinity, another width."""


class MissingExpertError(EvaluationError, LookupError):
    """An environment without a scripted expert to record demonstrations from."""


class UnreliableExpertError(EvaluationError, RuntimeError):
    """An expert that fails more often than it succeeds."""


# --- training ---------------------------------------------------------------------------------------------


class InvalidRecipeError(ManipulatorsError, ValueError):
    """A recipe that does not exist, or a value in it that no field takes."""


class InvalidTuningError(ManipulatorsError, ValueError):
    """A part that a policy does not have, or cannot tune as asked."""


class LaunchError(ManipulatorsError, RuntimeError):
    """Processes were launched that cannot work together, or for a command that runs in one process."""


class LostProcessError(ManipulatorsError, RuntimeError):
    """Another process of the run has ended without a word."""


class UnfinishedRunError(ManipulatorsError, RuntimeError):
    """A run that has trained its policy and then failed; nothing that it made is lost.

    Args:
        step: what failed.
        reason: why.
        kept: where the trained policy is.
        remedy: the command that repeats what failed, and nothing else.
    """

    def __init__(self, step: str, reason: BaseException, kept: object, remedy: str):
        super().__init__(
            f"The policy is trained, but {step} failed. {type(reason).__name__}: {reason}\n"
            f"Nothing is lost: it is in {kept}. Repeat only what failed:\n{remedy}"
        )


class ResumeMismatchError(CheckpointError, ValueError):
    """A checkpoint of another run than the one that is to go on from it."""

    def __init__(self, folder: str, different: Iterable[tuple[str, object, object]]):
        self.different = list(different)
        lines = [f"{folder} was written by another run than the one that is to go on from it:"]
        lines += _listed(
            self.different,
            "values differ" if len(self.different) > 1 else "value differs",
            lambda row: f"{row[0]}: {_shortened(row[1])} there, {_shortened(row[2])} here",
        )
        lines.append(
            f"Resume with the same values, or begin a new run from its weights: `base: {folder}` in a recipe, or "
            f"AutoPolicy.from_pretrained({folder!r})."
        )
        super().__init__("\n".join(lines))


def _shortened(value: object, length: int = 60) -> str:
    text = str(value)
    return text if len(text) <= length else f"{text[:length]}…"


class DivergedTrainingError(ManipulatorsError, FloatingPointError):
    """A training loss that is not finite."""

    def __init__(self, step: int, loss: float, parts: Mapping[str, float], checkpoint: object = None):
        named = ", ".join(f"{name}={value}" for name, value in parts.items()) or "no named parts"
        super().__init__(
            f"The loss is {loss} at step {step} ({named}). Lower the learning rate, or look for constant or "
            f"impossible values in the data's statistics. {_last_good(checkpoint)}"
        )


class DivergedWeightsError(DivergedTrainingError, CheckpointError):
    """Weights, or a training's state, that are not finite and therefore not saved."""

    def __init__(self, folder: object, not_finite: Iterable[str], checkpoint: object = None):
        self.not_finite = sorted(not_finite)
        lines = [f"Training has diverged, so {str(folder)!r} is not written:"]
        lines += _listed(self.not_finite, "with NaN or infinity", str)
        lines.append(f"Lower the learning rate. {_last_good(checkpoint)}")
        Exception.__init__(self, "\n".join(lines))


def _last_good(checkpoint: object) -> str:
    """Return where to begin again after a divergence."""
    if checkpoint is None:
        return "Begin again, or from a checkpoint that was saved before."
    return (
        f"The last checkpoint is good: a new run begins from its weights with `base: {checkpoint}` in a recipe, or "
        f"AutoPolicy.from_pretrained({str(checkpoint)!r})."
    )


# --- inference --------------------------------------------------------------------------------------------


class SharedPipelineError(ManipulatorsError, RuntimeError):
    """One pipeline that is asked for actions by two threads within an episode: chunks of two robots would mix.

    Args:
        owner: the thread that began the episode.
        caller: the other one.
    """

    def __init__(self, owner: str, caller: str):
        super().__init__(
            f"A pipeline drives one robot: the thread {owner!r} began this episode, and {caller!r} asks for its next "
            f"action. Give each robot a pipeline, which may share policy and processor: "
            f"PolicyPipeline(model=pipeline.policy, processor=pipeline.processor). Where several threads serve one "
            f"robot, let one of them ask: ThreadPoolExecutor(max_workers=1)."
        )


# --- processing -------------------------------------------------------------------------------------------


class ProcessingError(ManipulatorsError, ValueError):
    """Base class of everything that can be wrong with an observation, actions or their statistics."""


class MissingStatisticsError(ProcessingError):
    """A feature that must be normalised but has no statistics, or statistics of another width."""


class EmbodimentError(ProcessingError):
    """An embodiment that does not exist where it was looked for, or none chosen of several.

    Args:
        name: the one that was asked for; None, none was.
        known: those that exist.
        kind: what exists for them: `statistics`, `slots` in the network, or `records` in a published checkpoint.
    """

    def __init__(self, name: str | None, known: Iterable[str], kind: str = "statistics"):
        known = sorted(known)
        given = "No embodiment is chosen" if name is None else f"There is no embodiment {name!r}"
        if not known:
            super().__init__(f"{given}: the {kind} are of one robot, which has no name. Leave embodiment out.")
            return
        super().__init__(
            f"{given}. There are {kind} for: {', '.join(known)}. "
            f"Choose one: PolicyPipeline.from_pretrained(source, embodiment={known[0]!r})"
        )


class MissingTokenizerError(ProcessingError, OSError):
    """A policy that reads instructions, without the tokenizer of its language model."""

    def __init__(self, source: str | None, reason: object = "none was given"):
        wanted = f"The tokenizer {source!r} cannot be loaded" if source else "The policy reads an instruction"
        super().__init__(
            f"{wanted}: {reason}. Pass one, or a folder or Hub id that holds one: "
            f"tokenizer=AutoTokenizer.from_pretrained(folder). Gated repositories need `hf auth login` first."
        )


class MissingFeatureError(ProcessingError, KeyError):
    """An observation, or the inputs of a network, without something that is needed; `holder` says which."""

    def __init__(
        self,
        missing: Iterable[str],
        given: Iterable[str],
        expected: Iterable[str],
        holder: str = "The observation",
    ):
        missing, given, expected = sorted(missing), sorted(given), sorted(expected)
        reader = "The policy expects" if holder == "The observation" else "Expected"
        super().__init__(
            f"{holder} lacks {', '.join(missing)}. Given: {', '.join(given) or 'nothing'}. "
            f"{reader}: {', '.join(expected)}." + _renaming(missing, set(given) - set(expected))
        )

    def __str__(self) -> str:
        return self.args[0]


class UnknownInputError(ProcessingError, TypeError):
    """An argument of a policy that is none of its inputs."""

    def __init__(self, policy: str, name: str, known: Iterable[str]):
        super().__init__(f"{policy} takes no input {name!r}. {nearest(name, known)}")


class PredictionError(ManipulatorsError, ValueError):
    """A prediction that is no action chunk."""


def _renaming(missing: list[str], unknown: Iterable[str]) -> str:
    """Return the line that gives a feature its name, where one is given under another."""
    others = sorted(name for name in unknown if name.startswith("observation."))
    if not others:
        return ""
    return (
        f" If {others[0]} is {missing[0]}: PolicyPipeline.from_pretrained(source, "
        f"rename_map={{{others[0]!r}: {missing[0]!r}}})"
    )


class UnknownFeatureError(ProcessingError, KeyError):
    """An observation with a feature that the policy does not know."""

    def __init__(self, name: str, known: Iterable[str]):
        super().__init__(
            f"The observation has {name!r}, which the policy does not know. {nearest(name, known)} "
            f"Remove it from the observation or rename it."
        )

    def __str__(self) -> str:
        return self.args[0]


class FeatureShapeError(ProcessingError):
    """A feature of another width, size or number of dimensions than the policy expects."""

    def __init__(self, name: str, given: tuple, expected: str):
        super().__init__(f"{name} has shape {tuple(given)}; expected {expected}.")


class ImageTokenError(ProcessingError):
    """Prompts that do not hold as many image tokens as their pictures become."""

    def __init__(self, tokens: list[int], token_id: int, pictures: int, each: int):
        super().__init__(
            f"The prompts hold {tokens} image tokens (id {token_id}); expected {each} for each picture of a prompt, "
            f"{pictures * each} in all for pixel_values of {pictures} pictures. Prepare prompts and pictures with the "
            f"policy's processor, or pass only the pictures that have tokens."
        )


class FeatureValueError(ProcessingError):
    """A feature with impossible values: NaN, infinity, pixels outside [0, 1], a wrong type."""


class ImplausibleObservationError(ProcessingError):
    """A state so far outside the training range that it cannot be meant in the same units.

    Args:
        name, dimension: the feature, and which of its numbers.
        value, unit: what was given.
        usual: lowest and highest value in training.
        ranges: how many training ranges it lies outside.
        limit: how many are allowed.
    """

    def __init__(
        self,
        name: str,
        dimension: str,
        value: float,
        unit: str | None,
        usual: tuple[float, float],
        ranges: float,
        limit: float,
    ):
        unit = f" {unit}" if unit else ""
        super().__init__(
            f"{name} {dimension!r} is {value:.6g}; in training it was {usual[0]:.6g} to {usual[1]:.6g}{unit}, so that "
            f"it lies {ranges:.4g} training ranges outside. Up to {limit:g} are allowed: beyond, units are not "
            f"those of training, as with mm for m, or a sensor fails. Convert the state; where it may lie anywhere: "
            f"PolicyPipeline.from_pretrained(source, observation_limit=None)"
        )


# --- data -------------------------------------------------------------------------------------------------
# One message each: a DataLoader re-raises a worker's error as `type(error)(message)`.


class DatasetError(ManipulatorsError):
    """Base class of everything that can be wrong with recorded episodes."""


class DatasetNotFoundError(DatasetError, FileNotFoundError):
    """A folder or Hub repository that does not exist, or a dataset without one of its files."""


class DatasetFormatError(DatasetError, ValueError):
    """A dataset file that cannot be read, or whose contents contradict each other."""


class DatasetVersionError(DatasetError, ValueError):
    """A dataset in a version of the LeRobot format that cannot be read here."""


class DatasetIndexError(DatasetError, IndexError):
    """A frame or an episode outside the dataset."""


class UnknownDatasetFeatureError(DatasetError, KeyError):
    """A feature that the dataset does not have."""

    def __str__(self) -> str:  # KeyError would print the repr of its argument
        return self.args[0]


class DifferentDatasetsError(DatasetError, ValueError):
    """Datasets that cannot become one: they differ in rate, robot or features."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        super().__init__("\n".join(["The datasets cannot be merged:", *(f"  {problem}" for problem in self.problems)]))


class UnknownTaskError(DatasetError, LookupError):
    """An instruction that no frame of the chosen episodes has."""


class StaleStatisticsError(DatasetError, ValueError):
    """Recorded statistics that are not those of the data."""


class StreamError(DatasetError, TypeError):
    """Something that a stream of samples does not have, such as a length or a sample by its number."""


class TimeWindowError(DatasetError, ValueError):
    """A horizon, history or list of timestamps that does not fall on recorded frames."""


class MixtureError(InvalidConfigError, DatasetError):
    """Datasets that cannot be one mixture, or one that a policy cannot learn from.

    Args:
        problem: with the names of the datasets.
        remedy: what to do.
    """

    def __init__(self, problem: str, remedy: str):
        super().__init__(f"{problem}. {remedy}.")


class VideoError(DatasetError, OSError):
    """A video that cannot be opened, decoded or encoded."""


class MissingVideoError(VideoError, FileNotFoundError):
    """A video file that the dataset's metadata names and the folder lacks."""


class FrameNotFoundError(VideoError):
    """A video without a frame close enough to the time asked for."""


class RecordingError(DatasetError, RuntimeError):
    """A recording that cannot go on: a closed writer, an unfinished or an empty episode."""


class DifferentRecordingError(RecordingError, ValueError):
    """A folder with finished episodes of another recording than the one that is to go on there."""

    def __init__(self, folder: object, episodes: int, differences: Mapping[str, tuple[object, object]]):
        super().__init__(
            f"{folder} holds {episodes} finished episodes of another recording: {_differences(differences)}. Record "
            f"with what they have, choose another folder, or remove them: rm -r {folder}"
        )


def _differences(differences: Mapping[str, tuple[object, object]]) -> str:
    return "; ".join(_difference(name, *pair) for name, pair in differences.items())


def _difference(name: str, found: object, given: object) -> str:
    """Say what differs, of mappings only the entries that do."""
    if isinstance(found, Mapping) and isinstance(given, Mapping):
        keys = sorted(key for key in found.keys() | given.keys() if found.get(key) != given.get(key))
        return "; ".join(_difference(f"{name} {key}", found.get(key), given.get(key)) for key in keys)
    return f"{name} is {'absent' if found is None else found} there and {'absent' if given is None else given} here"


class DiskFullError(DiskError, RecordingError):
    """A disk that ran full while something was written; nothing half written is left under its name."""


class InvalidFrameError(DatasetError, ValueError):
    """A recorded frame with a missing, unknown or mis-shaped feature, or with values that are not finite."""
