"""What the configurations of policies share that look at pictures, read an instruction and know the robot's state."""

from __future__ import annotations

from typing import ClassVar

from ..errors import InvalidConfigError
from .features import IMAGE_PREFIX, FeatureType, PolicyFeature
from .policy import PolicyConfig


class VisionLanguageActionConfig(PolicyConfig):
    """Hold what π0 and GR00T share: a state, an instruction, and cameras of which some may be empty.

    Args:
        empty_cameras (`int`, *optional*, defaults to 0): cameras that the policy knows and this robot lacks. They are
            named `observation.images.empty_camera_0` and so on, and are optional. With no other cameras the policy is
            blind, which is what a policy that sees is to be compared with.
    """

    reads_instruction: ClassVar[bool] = True
    resizes_pictures: ClassVar[bool] = True
    pads_widths: ClassVar[bool] = True

    needs_state: ClassVar[bool] = True

    empty_cameras: int = 0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._add_empty_cameras()

    def set_input_output_features(
        self, input_features: dict[str, PolicyFeature], output_features: dict[str, PolicyFeature]
    ) -> None:
        """Set what the policy observes and what it returns; `empty_cameras` are added."""
        super().set_input_output_features(input_features, output_features)
        self._add_empty_cameras()

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Shape (3, height, width) of the pictures that the network sees."""
        raise NotImplementedError(f"{type(self).__name__} must say its picture_shape")

    def _add_empty_cameras(self) -> None:
        if not self.input_features:
            return
        names = [f"{IMAGE_PREFIX}empty_camera_{i}" for i in range(self.empty_cameras)]
        camera = PolicyFeature(FeatureType.VISUAL, self.picture_shape)
        self.input_features = self.input_features | {n: camera for n in names if n not in self.input_features}
        self.optional_cameras += tuple(name for name in names if name not in self.optional_cameras)

    def validate_history(self) -> None:
        """Check that no observation history is asked for: only the current observation is looked at."""
        if self.n_obs_steps != 1:
            raise InvalidConfigError(f"n_obs_steps={self.n_obs_steps}: {self.title} looks at 1 observation only.")

    def validate_inputs(self) -> None:
        """Check that there are cameras and a state, and nothing that the policy has no tokens for."""
        if self.input_features and not self.image_features and not self.empty_cameras:
            raise InvalidConfigError(
                f"{self.title} needs a camera; input_features holds no 'observation.images.<camera>'. For a policy "
                f"that is blind on purpose: empty_cameras=1."
            )
        if self.input_features and self.state_dim is None and self.needs_state:
            raise InvalidConfigError(
                f"{self.title} needs the robot's state; input_features holds no 'observation.state'."
            )
        if self.environment_state_dim:
            raise InvalidConfigError(
                f"{self.title} does not read 'observation.environment_state'; remove it from the features."
            )
        for name, feature in self.image_features.items():
            if feature.shape[0] != 3:
                raise InvalidConfigError(f"{name} has {feature.shape[0]} channels; {self.title} sees RGB, 3.")
