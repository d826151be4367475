"""What an environment reports of a step, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InvalidEnvironmentError


def reported_success(info: Mapping[str, Any], environment: str) -> bool:
    """Return `info["success"]` of a step.

    Raises:
        InvalidEnvironmentError: there is none, or it is neither a boolean nor the number 0 or 1.
    """
    if "success" not in info:
        raise InvalidEnvironmentError(
            f"{environment} does not report success; its info holds {sorted(info)}.\n"
            'Return info["success"] = True or False from every step.'
        )
    value = np.asarray(info["success"])
    if value.size != 1 or value.dtype.kind not in "biuf" or value.item() not in (0, 1):
        raise InvalidEnvironmentError(
            f"{environment} reports success = {info['success']!r} ({type(info['success']).__name__}), which is "
            f'neither true nor false.\nReturn info["success"] = True or False from every step.'
        )
    return bool(value.item())
