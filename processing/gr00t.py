"""Processors of GR00T N1.5 and N1: Eagle's pictures and prompts, and states and actions normalised part by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.nn import functional as F  # noqa: N812  (torch's own convention)
from transformers import BatchFeature

from ..configuration.features import ACTION, STATE, FeatureType, PolicyFeature
from ..configuration.gr00t import NEW_EMBODIMENT, GR00TConfig
from ..configuration.gr00t_n1 import GR00TN1Config
from ..configuration.gr00t_n1_5 import GR00TN1_5Config
from ..errors import CheckpointError, EmbodimentError, FeatureValueError, MissingFeatureError
from .arrays import read_vector
from .eagle import (
    IMAGE_TOKEN,
    EagleFormat,
    EagleFormatN1,
    EagleFormatN1_5,
    from_bytes,
    require_special_tokens,
    tokenize,
)
from .normalization import Normalizer
from .padding import PaddingProcessor
from .parts import Part, PartsNormalizer, one_part, read_parts, short_name, whole_statistics
from .registry import register_processor


class GR00TProcessor(PaddingProcessor):
    """Prepare observations for GR00T, and bring its chunks back to robot units.

    Pictures of any size are cropped to their centre, resized to a square and brought to [-1, 1]. Every camera that is
    present has its image tokens in the prompt; `input_ids` are padded on the left to the longest prompt of the batch.
    States and actions consist of parts, each normalised in its own mode, and are padded with zeros. A state may come
    whole, as `observation.state`, or as NVIDIA's users have it, as `state.<part>` for every part.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the Eagle model's, or a tokenizer of words, which is given the special
            tokens that it lacks.
        max_state_dim (`int`, *optional*, defaults to 64): width of the network's states.
        max_action_dim (`int`, *optional*, defaults to 32): width of its actions.
        tokens_per_image (`int`, *optional*): image tokens of a picture; by default the published model's.
        image_size (`int`, *optional*, defaults to 224): height and width of the pictures that the network sees.
        image_crop_scale (`float`, *optional*, defaults to 0.95): the share of height and of width that is kept.
        state_parts (`dict[str, dict]`, *optional*): part → `{"width": …, "mode": …}`, in the order in which they stand
            in the state; see `PartsNormalizer` for the modes. By default one part, in the mode of its feature type.
        action_parts (`dict[str, dict]`, *optional*): the same of the action.
        embodiment (`str`, *optional*, defaults to `"new_embodiment"`): which robot it is.
        embodiment_ids (`dict[str, int]`, *optional*): robot → the slot that its projectors have in the network; by
            default the published model's.
        kwargs: what `PaddingProcessor` takes. Statistics may be those of parts, see `whole_statistics`.

    Raises:
        EmbodimentError: the robot has no slot.
        InvalidConfigError: parts, widths or sizes that cannot be.
        MissingStatisticsError: a part is to be normalised and its statistics are absent or do not fit.
        MissingTokenizerError: there is no tokenizer, or one that is not an Eagle model's.
    """

    chat_format: ClassVar[type[EagleFormat]]
    policy_config: ClassVar[type[GR00TConfig]]  # whose defaults are the published model's
    compared_fields: ClassVar[tuple[str, ...]] = (
        *PaddingProcessor.compared_fields,
        "tokens_per_image",
        "image_size",
        "image_crop_scale",
        "state_parts",
        "action_parts",
        "embodiment_ids",
    )

    # transformers finds what has files of its own, the tokenizer, by the names in this signature.
    def __init__(
        self,
        tokenizer=None,
        max_state_dim=64,
        max_action_dim=32,
        tokens_per_image=None,
        image_size=224,
        image_crop_scale=0.95,
        state_parts=None,
        action_parts=None,
        embodiment=NEW_EMBODIMENT,
        embodiment_ids=None,
        **kwargs,
    ):
        self.tokens_per_image = tokens_per_image or self.policy_config.eagle_class().image_tokens()
        self.image_size = image_size
        self.image_crop_scale = image_crop_scale
        self.format = self.chat_format(self.tokens_per_image, image_size)
        self.state_parts = state_parts
        self.action_parts = action_parts
        self.embodiment_ids = dict(
            self.policy_config.default_embodiments if embodiment_ids is None else embodiment_ids
        )
        if embodiment not in self.embodiment_ids:
            raise EmbodimentError(embodiment, self.embodiment_ids)
        super().__init__(
            tokenizer=None if tokenizer is None else require_special_tokens(tokenizer),
            max_state_dim=max_state_dim,
            max_action_dim=max_action_dim,
            embodiment=embodiment,
            **kwargs,
        )

    @classmethod
    def from_config(cls, config: GR00TConfig, statistics: Mapping | None = None, **kwargs: Any) -> GR00TProcessor:
        """Build the processor of a policy's config; see `LanguageProcessor.from_config`."""
        return super().from_config(
            config,
            statistics,
            tokens_per_image=config.tokens_per_image,
            image_size=config.image_size,
            image_crop_scale=config.image_crop_scale,
            state_parts=config.state_parts,
            action_parts=config.action_parts,
            embodiment=config.embodiment_tag,
            embodiment_ids=config.embodiment_ids,
            **kwargs,
        )

    # --- parts ------------------------------------------------------------------------------------------

    def parts(self, name: str) -> list[Part]:
        """Return the parts of the state or the action, in the order in which they stand in it."""
        feature = (self.input_features | self.output_features)[name]
        given = self.state_parts if name == STATE else self.action_parts
        given = given or one_part(short_name(name), feature.shape[0], self.normalization_mode(feature))
        return read_parts(name, given, feature.shape[0])

    def _vectors(self) -> list[str]:
        return [name for name in (STATE, ACTION) if name in self.input_features | self.output_features]

    def _used(self, statistics: Mapping[str, Mapping]) -> dict[str, dict[str, list]]:
        whole = {name: whole_statistics(name, self.parts(name), statistics) for name in self._vectors()}
        others = {name: values for name, values in statistics.items() if name not in whole}
        return super()._used(others | {name: values for name, values in whole.items() if values})

    def model_width(self, name: str) -> int:
        """Return how wide the state or the action is before it is padded, of angles sine and cosine."""
        return sum(part.model_width for part in self.parts(name)) if name in self._vectors() else 0

    def _build_normalizer(
        self, name: str, feature: PolicyFeature, statistics: Mapping | None
    ) -> Normalizer | PartsNormalizer:
        if name in self._vectors():
            return PartsNormalizer(name, self.parts(name), statistics)
        return super()._build_normalizer(name, feature, statistics)

    def describe_normalization(self, name: str) -> str:
        """Return how a feature is normalised, part by part where it has several."""
        if name not in self._vectors():
            return super().describe_normalization(name)
        return ", ".join(f"{part.name} ({part.width}) {part.mode}" for part in self.parts(name))

    def choose_embodiment(self, name: str) -> None:
        """Use the slot and the statistics of one of the robots that the policy knows.

        Raises:
            EmbodimentError: it has no slot for it, or no statistics of it.
        """
        known = self.embodiment_ids.keys() & (self.embodiments or {self.embodiment: None}).keys()
        if name not in known:
            raise EmbodimentError(name, known)
        if self.embodiments:
            super().choose_embodiment(name)

    # --- observation → model inputs -----------------------------------------------------------------------

    def __call__(
        self,
        observation: Mapping[str, Any],
        task: str | list[str] | None = None,
        actions: Any = None,
        action_is_pad: Any = None,
    ) -> BatchFeature:
        """Return normalised model inputs, with a batch dimension.

        Args:
            observation, task, actions, action_is_pad: see `LanguageProcessor`.

        Returns:
            `pixel_values` (b, v, 3, size, size) in [-1, 1], `state` (b, s), `input_ids` and `attention_mask` (b, n),
            `embodiment_id` (b,) int64; of labels `actions` (b, h, a), `action_is_pad` (b, h) and `action_mask`
            (b, h, a); with optional cameras `pixel_mask` (b, v).
        """
        inputs = super().__call__(observation, task, actions, action_is_pad)
        slot = self.embodiment_ids[self.embodiment]
        inputs["embodiment_id"] = torch.full((len(inputs["input_ids"]),), slot)  # (b,) int64
        return inputs

    def read_observation(self, observation: Mapping[str, Any], steps: int) -> dict[str, torch.Tensor]:
        """Return an observation's features in raw units; a state that comes in parts is joined."""
        return super().read_observation(self._with_whole_state(observation), steps)

    def raw_state(self, observation: Mapping[str, Any]) -> Any:
        """Return the robot's state in an observation, joined where it comes in parts; None when absent."""
        return super().raw_state(self._with_whole_state(observation))

    def _with_whole_state(self, observation: Mapping[str, Any]) -> Mapping[str, Any]:
        if STATE not in self.input_features or not isinstance(observation, Mapping):
            return observation
        widths = {f"state.{part.name}": part.width for part in self.parts(STATE)}
        given = [name for name in widths if name in observation]
        if not given:
            return observation
        if super().raw_state(observation) is not None:
            raise FeatureValueError(f"The observation holds {STATE} twice, whole and as {', '.join(given)}.")
        if len(given) < len(widths):
            raise MissingFeatureError(widths.keys() - set(given), observation, widths)
        vectors = [read_vector(name, observation[name], width) for name, width in widths.items()]
        if len({vector.shape[:-1] for vector in vectors}) > 1:
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(widths, vectors, strict=True))
            raise FeatureValueError(f"The parts of the state have different leading dimensions: {shapes}.")
        others = {name: value for name, value in observation.items() if name not in widths}
        return others | {STATE: torch.cat(vectors, dim=-1)}

    def encode(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return what the network sees: (b, 3, size, size) in [-1, 1] for a camera, (…, width) padded for a vector."""
        x = super().encode(name, x)
        feature = (self.input_features | self.output_features)[name]
        if feature.type is FeatureType.VISUAL:
            return from_bytes(crop_and_resize(x, self.image_crop_scale, self.image_size))
        return x

    def absent_picture(self, name: str) -> torch.Tensor:
        """Return a black picture (3, size, size): -1 everywhere."""
        return torch.full((3, self.image_size, self.image_size), -1.0)

    def encode_instruction(
        self, task: str | list[str] | None, batch_size: int, inputs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return `input_ids` (b, n) and `attention_mask` (b, n): the pictures' tokens, then the instruction's.

        Args:
            task: one for all, or one each; what is longer than `max_instruction_tokens` is cut.
            batch_size: b.
            inputs: what else was prepared; none, no pictures.
        """
        tasks = [self._cut(text) for text in self.read_instructions(task, batch_size)]
        tiles = [[1] * count for count in _present_cameras(inputs or {}, batch_size)]
        return tokenize(self.tokenizer, [self.format.prompt(*pair) for pair in zip(tasks, tiles, strict=True)])

    def _cut(self, task: str) -> str:
        if self.max_instruction_tokens is None:
            return task
        ends = self.tokenizer(task, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return task if len(ends) <= self.max_instruction_tokens else task[: ends[self.max_instruction_tokens - 1][1]]

    # --- chunk → robot units ------------------------------------------------------------------------------

    def split_actions(self, actions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return actions in robot units (…, a) by part: `{"action.<part>": (…, width)}`."""
        parts = self.parts(ACTION)
        pieces = actions.split([part.width for part in parts], dim=-1)
        return {f"action.{part.name}": piece for part, piece in zip(parts, pieces, strict=True)}

    # --- agreement ----------------------------------------------------------------------------------------

    def check_agreement(self, config: GR00TConfig) -> None:
        """Check that this processor feeds the policy that `config` describes.

        Raises:
            CheckpointError: features, parts, sizes, widths or the robot differ, or tokens have other ids.
        """
        super().check_agreement(config)
        # Of several robots, one may be chosen after loading.
        if not self.embodiments and self.embodiment != config.embodiment_tag:
            raise CheckpointError(
                f"The processor has the statistics of {self.embodiment!r}, the policy's embodiment_tag is "
                f"{config.embodiment_tag!r}. Build it from the policy's config: "
                f"{type(self).__name__}.from_config(config, statistics)."
            )
        mine, theirs = self.image_token_id, config.image_token_index
        if theirs not in (None, mine):
            raise CheckpointError(
                f"{IMAGE_TOKEN} has the id {mine} in the tokenizer, but the policy looks for {theirs}. Take the "
                f"tokenizer that it was trained with; the config of a policy trained anew must say {mine}."
            )
        text = config.eagle_class.of(config.eagle_config).language_config
        if len(self.tokenizer) > text.vocab_size:
            raise CheckpointError(
                f"The tokenizer knows {len(self.tokenizer)} tokens, the policy's language model {text.vocab_size}: "
                f"its vocab_size in eagle_config."
            )

    @property
    def image_token_id(self) -> int:
        """The id of the token in whose place a picture's features stand."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


class GR00TN1_5Processor(GR00TProcessor):
    """Prepare observations for GR00T N1.5; see `GR00TProcessor`."""

    chat_format = EagleFormatN1_5
    policy_config = GR00TN1_5Config


class GR00TN1Processor(GR00TProcessor):
    """Prepare observations for GR00T N1; see `GR00TProcessor`."""

    chat_format = EagleFormatN1
    policy_config = GR00TN1Config


def crop_and_resize(pictures: torch.Tensor, crop_scale: float, size: int) -> torch.Tensor:
    """Return pictures (b, 3, h, w) in [0, 1] as uint8 (b, 3, size, size): their centre, resized without its aspect.

    Bilinear with smoothing; what lies between two levels is cut off, not rounded, as it was in training. Source:
    NVIDIA's Isaac-GR00T, `VideoCrop` and `VideoResize`.
    """
    h, w = pictures.shape[-2:]
    height, width = int(h * crop_scale), int(w * crop_scale)
    top, left = round((h - height) / 2), round((w - width) / 2)
    x = pictures[..., top : top + height, left : left + width]
    if (height, width) != (size, size):
        x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    return (x * 255).to(torch.uint8)


def _present_cameras(inputs: Mapping[str, Any], batch_size: int) -> list[int]:
    """Return how many pictures each observation has."""
    if "pixel_mask" in inputs:
        return inputs["pixel_mask"].sum(dim=1).tolist()
    return [inputs["pixel_values"].shape[1] if "pixel_values" in inputs else 0] * batch_size


for _processor_class in (GR00TN1_5Processor, GR00TN1Processor):
    register_processor(_processor_class.policy_config.model_type, _processor_class)
