"""The plain values that a card states, checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from ..configuration.contract import Contract, ContractEntry
from ..errors import InvalidCardError, nearest


@dataclass
class Paper:
    """Name the publication of a method."""

    title: str
    url: str = ""


@dataclass
class DatasetSummary:
    """Say what the policy was trained on.

    Args:
        name (`str`): Hub id (`org/name`) or the name of a local dataset.
        episodes, frames (`int`, *optional*): how many demonstrations, and time steps in all of them.
        tasks (`int`, *optional*): number of different tasks.
        weight, share (`float`, *optional*): in a mixture, as given, and of the samples that were seen, 0 to 1.
        embodiment (`str`, *optional*): its robot, of several.
        mixture (`Sequence[DatasetSummary]`): the datasets that it consists of, of a mixture.
    """

    name: str
    episodes: int | None = None
    frames: int | None = None
    tasks: int | None = None
    weight: float | None = None
    share: float | None = None
    embodiment: str | None = None
    mixture: Sequence[DatasetSummary] = ()

    def __post_init__(self):
        self.mixture = [_built(DatasetSummary, part) for part in self.mixture]

    @property
    def names(self) -> list[str]:
        """The names of the datasets in it: its own, or those of a mixture."""
        return [part.name for part in self.mixture] or [self.name]


@dataclass
class TrainingSummary:
    """Say how the policy was trained; everything may be absent.

    Args:
        learning_rate (`float` or `Mapping[str, float]`): one value, or one per part of the policy.
        batch_size (`int`): samples of a step, in all processes together.
        seconds (`float`): wall-clock time.
        losses (`Mapping[str, float]`): the last logged loss and its named parts.
        command (`str`): the command line that repeats the run.
        ema_decay (`float`): the weights are an exponential moving average over the steps, of at most this decay.
    """

    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | Mapping[str, float] | None = None
    seconds: float | None = None
    processes: int | None = None
    hardware: str | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    command: str | None = None
    ema_decay: float | None = None


@dataclass
class EvaluationSummary:
    """Say how well the policy does; the fields are those of `evaluation.json`.

    Args:
        environment (`str`): what it acted in.
        episodes (`int`): how many times it tried.
        success_rate (`float`): share of episodes solved, 0 to 1.
        interval (`tuple[float, float]`, *optional*): 95 % confidence interval of the success rate, 0 to 1.
        seeds (`Sequence[int]` or `str`, *optional*): the seed of each episode.
        mean_return, mean_length (`float`, *optional*): means over episodes; length in steps.
        milliseconds_per_action (`float`, *optional*): mean time of one control step of the policy.
        num_envs (`int`): environments that such a step serves at once.
        clipped_fraction (`float`, *optional*): share of the actions that left the action space, 0 to 1.
        horizon (`int`, *optional*): steps after which an episode counts as failed.
        command (`str`, *optional*): the command line that repeats the measurement.
        video (`str`, *optional*): file in the checkpoint folder that shows the first episodes.
        video_note (`str`, *optional*): what it shows, or why there is none.
        simulated (`bool`): False for episodes on a real robot.
        task (`str`, *optional*): the instruction that the policy was given.
        date (`str`, *optional*): when, in ISO 8601.
        n_action_steps, sampling_steps (`int`, *optional*): actions executed of a prediction, and steps of making it.
        dtype, device (`str`, *optional*): of the weights, and where it ran.
        embodiment (`str`, *optional*): which robot it was, of a policy that knows several.
        errors (`int`): episodes that ended in an error of the environment; they count as failed.
        requested_episodes (`int`, *optional*): those that were asked for, where the evaluation was stopped before.
        further (`Sequence[EvaluationSummary]`): evaluations beside this one, over the same seeds.
    """

    environment: str
    episodes: int
    success_rate: float
    interval: tuple[float, float] | None = None
    seeds: Sequence[int] | str | None = None
    mean_return: float | None = None
    mean_length: float | None = None
    milliseconds_per_action: float | None = None
    num_envs: int = 1
    clipped_fraction: float | None = None
    horizon: int | None = None
    command: str | None = None
    video: str | None = None
    video_note: str | None = None
    simulated: bool = True
    task: str | None = None
    date: str | None = None
    n_action_steps: int | None = None
    sampling_steps: int | None = None
    dtype: str | None = None
    device: str | None = None
    embodiment: str | None = None
    errors: int = 0
    requested_episodes: int | None = None
    further: Sequence[EvaluationSummary] = ()

    def __post_init__(self):
        self.further = [_built(EvaluationSummary, other, allow_more=True) for other in self.further]
        if self.episodes < 1 or not 0 <= self.success_rate <= 1:
            raise InvalidCardError(
                f"An evaluation needs at least 1 episode and a success_rate from 0 to 1; "
                f"got episodes={self.episodes}, success_rate={self.success_rate}."
            )
        if abs(self.solved / self.episodes - self.success_rate) > 1e-3:
            raise InvalidCardError(
                f"success_rate={self.success_rate} is impossible with episodes={self.episodes}: "
                f"the nearest is {self.solved} of {self.episodes} = {self.solved / self.episodes:.4f}."
            )
        if self.interval is not None:
            low, high = self.interval = tuple(float(end) for end in self.interval)
            if not 0 <= low <= self.success_rate + 1e-3 or not self.success_rate - 1e-3 <= high <= 1:
                raise InvalidCardError(
                    f"interval={self.interval} must lie in 0 to 1 and hold success_rate={self.success_rate}."
                )

    @property
    def solved(self) -> int:
        """The number of episodes that succeeded."""
        return round(self.success_rate * self.episodes)


@dataclass(kw_only=True)
class CardData:
    """Hold everything that a policy's card states, as plain values.

    Mappings are accepted for `paper`, `dataset`, `training` and `evaluation`, which may hold more than the card
    shows, as `evaluation.json` does.

    Args:
        policy_name (`str`): as people say it, such as `ACT`.
        model_type (`str`): as in `config.json`, such as `act_policy`; selects the text about the method.
        parameters (`int`): numbers in its weights, fixed ones included.
        inputs, outputs (`Sequence[ContractEntry]`): what it expects and returns.
        embodiment (`str`, *optional*): which robot it is for, of a policy that knows several.
        robots (`Mapping[str, Contract]`): robot → what it observes and does, of a policy that knows several whose
            features differ; `inputs` and `outputs` are then those of `embodiment`.
        summary (`str`): one or two plain sentences about the method; empty takes those of the model type.
        paper (`Paper`, *optional*) and citation (`str`, BibTeX): default to those of the model type.
        repo_id (`str`, *optional*): where the policy is published; None leaves a placeholder in the examples.
        license (`str`): a licence id of the Hub; `other` needs `license_name`.
        license_note (`str`): a sentence on why it is not this library's own.
        action_horizon, n_action_steps (`int`, *optional*): actions predicted at once, and executed of those.
        n_obs_steps (`int`): observations it looks at; the first predicted action belongs to the oldest of them.
        control_rate_hz (`float`, *optional*): actions per second in the training data.
        instruction (`bool` or `str`): whether it takes an instruction in words; a string is an example.
        dataset, training, evaluation: see `DatasetSummary`, `TrainingSummary`, `EvaluationSummary`.
        log_history (`Sequence[Mapping]`): `trainer.state.log_history`, for the learning curve.
        limits (`Sequence[str]`): sentences beside those that follow from the other values.
        base_model (`str`, *optional*): what it was fine-tuned from.
        components (`Mapping[str, str]`): of a composed policy, the types of its `backbone` and `action_head`.
        is_adapter (`bool`): the weights are those of an adapter, without its base.
        versions (`Mapping[str, str]`): library name to version.
    """

    policy_name: str
    model_type: str
    parameters: int
    inputs: Sequence[ContractEntry]
    outputs: Sequence[ContractEntry]
    embodiment: str | None = None
    robots: Mapping[str, Contract] = field(default_factory=dict)
    summary: str = ""
    paper: Paper | None = None
    citation: str = ""
    repo_id: str | None = None
    license: str = "apache-2.0"
    license_name: str | None = None
    license_link: str | None = None
    license_note: str = ""
    action_horizon: int | None = None
    n_action_steps: int | None = None
    n_obs_steps: int = 1
    control_rate_hz: float | None = None
    instruction: bool | str = False
    dataset: DatasetSummary | None = None
    training: TrainingSummary | None = None
    log_history: Sequence[Mapping] = ()
    evaluation: EvaluationSummary | None = None
    limits: Sequence[str] = ()
    base_model: str | None = None
    components: Mapping[str, str] = field(default_factory=dict)
    is_adapter: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.paper = _built(Paper, self.paper)
        self.dataset = _built(DatasetSummary, self.dataset)
        self.training = _built(TrainingSummary, self.training)
        self.evaluation = _built(EvaluationSummary, self.evaluation, allow_more=True)
        if not self.inputs or not self.outputs:
            raise InvalidCardError("A card needs at least one input and one output; pass ContractEntry objects.")


def _built(cls: type, value, allow_more: bool = False):
    """Return `value`, or the `cls` that a mapping describes."""
    if not isinstance(value, Mapping):
        return value
    known = {entry.name for entry in fields(cls)}
    unknown = [] if allow_more else sorted(set(value) - known)
    if unknown:
        raise InvalidCardError(f"{cls.__name__} has no field {unknown[0]!r}. {nearest(unknown[0], known)}")
    try:
        return cls(**{name: entry for name, entry in value.items() if name in known})
    except TypeError as error:  # a required field is absent
        raise InvalidCardError(f"{cls.__name__} cannot be built from {sorted(value)}: {error}.") from error
