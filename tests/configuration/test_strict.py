"""StrictConfig in a module that postpones the evaluation of its annotations, as many do."""

from __future__ import annotations

import pytest

from manipulators.configuration.policy import PolicyConfig
from manipulators.errors import InvalidConfigError


class PostponedConfig(PolicyConfig):
    """A policy's config whose annotations are text when the class is made."""

    model_type = "postponed"

    sizes: tuple[int, ...] = (1, 2)
    rate: float = 0.5


def test_postponed_annotations_convert_and_check_as_others_do():
    config = PostponedConfig.from_dict({"sizes": [3, 4], "rate": 1})
    assert config.sizes == (3, 4)
    assert config.rate == 1.0 and isinstance(config.rate, float)
    with pytest.raises(InvalidConfigError, match=r"PostponedConfig\.rate"):
        PostponedConfig(rate="fast")
