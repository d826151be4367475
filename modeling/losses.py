"""What a loss is averaged over: one vocabulary for all policies.

Shapes: b batch, h horizon, a action width. What counts is said by a config's `loss_over`:

    over       steps beyond the episode    padded dimensions
    "real"     left out                    left out
    "steps"    counted                     left out             π0 in LeRobot, GR00T as published, Diffusion Policy
    "all"      counted                     counted              π0 in openpi
"""

from __future__ import annotations

import torch

from ..errors import InvalidConfigError, nearest

OVER = ("real", "steps", "all")


def mean_over(
    error: torch.Tensor,
    action_is_pad: torch.Tensor | None = None,
    action_mask: torch.Tensor | None = None,
    over: str = "real",
) -> torch.Tensor:
    """Return the mean of an error (b, h, a) over what counts; 0 where nothing does.

    Args:
        error: (b, h, a).
        action_is_pad: (b, h) bool, True where a step lies beyond the episode.
        action_mask: (b, h, a), or what expands to it; False or 0 in padded dimensions.
        over: one of `OVER`.

    Raises:
        InvalidConfigError: `over` is none of them.
    """
    if over not in OVER:
        raise InvalidConfigError(f"loss_over={over!r} is not known. {nearest(over, OVER)}")
    valid = counted(error, action_is_pad, action_mask, over)
    # Zero times NaN is NaN: padding may hold anything, so it is replaced, not multiplied away.
    return torch.where(valid > 0, error, 0).sum() / valid.sum().clamp(min=1)


def counted(
    error: torch.Tensor,
    action_is_pad: torch.Tensor | None = None,
    action_mask: torch.Tensor | None = None,
    over: str = "real",
) -> torch.Tensor:
    """Return 1 where a value of an error (b, h, a) counts and 0 elsewhere; arguments as in `mean_over`."""
    valid = torch.ones_like(error)
    if action_is_pad is not None and over == "real":
        valid = valid * ~action_is_pad[:, :, None]
    if action_mask is not None and over != "all":
        valid = valid * action_mask
    return valid


def sums_of_samples(
    error: torch.Tensor,
    action_is_pad: torch.Tensor | None = None,
    action_mask: torch.Tensor | None = None,
    over: str = "real",
) -> torch.Tensor:
    """Return the sum over what counts of each sample's error, and how much counts, (b, 2); as in `mean_over`."""
    error = error.detach()
    valid = counted(error, action_is_pad, action_mask, over)
    return torch.stack([torch.where(valid > 0, error, 0).sum(dim=(1, 2)), valid.sum(dim=(1, 2))], dim=-1).float()


def fill_padded(actions: torch.Tensor, action_is_pad: torch.Tensor) -> torch.Tensor:
    """Return actions (b, h, a) in which padded steps repeat the real step before them, or else the first real one.

    Steps of a chunk see each other, so what stands in padding that does not count must not be left to chance. A
    LeRobot dataset pads in the same way.

    Args:
        actions: (b, h, a).
        action_is_pad: (b, h) bool, True where a step lies beyond the episode.
    """
    steps = torch.arange(actions.shape[1], device=actions.device).expand_as(action_is_pad)  # (b, h)
    first = (~action_is_pad).int().argmax(dim=1, keepdim=True)  # (b, 1)
    nearest_real = torch.where(action_is_pad, first, steps).cummax(dim=1).values
    return actions.gather(1, nearest_real[:, :, None].expand_as(actions))
