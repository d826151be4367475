"""One masked mean for every loss: padded steps and padded action dimensions do not count."""

import torch


def masked_mean(
    values: torch.Tensor, is_pad: torch.Tensor | None = None, action_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the mean of (b, h, a) values over the steps and dimensions that are real.

    Args:
        values: (b, h, a).
        is_pad: (b, h) bool, True where a step lies beyond the episode.
        action_mask: (b, h, a) or (b, 1, a) bool, False in padded dimensions.

    Returns:
        A scalar; 0 when nothing is real.
    """
    valid = torch.ones_like(values) if is_pad is None else (~is_pad)[:, :, None].to(values.dtype).expand_as(values)
    if action_mask is not None:
        valid = valid * action_mask
    # Zero times NaN is NaN: padding may hold anything, so it is replaced, not multiplied away.
    return torch.where(valid > 0, values, 0).sum() / valid.sum().clamp(min=1)


def fill_padded(actions: torch.Tensor, is_pad: torch.Tensor) -> torch.Tensor:
    """Return actions (b, h, a) whose padded steps repeat the real step before them, or else the first real one.

    A LeRobot dataset pads so; of actions from elsewhere, nothing that stands in padding is left.

    Args:
        actions: (b, h, a).
        is_pad: (b, h) bool, True where a step lies beyond the episode.
    """
    steps = torch.arange(actions.shape[1], device=actions.device).expand_as(is_pad)  # (b, h)
    first = (~is_pad).int().argmax(dim=1, keepdim=True)  # (b, 1)
    nearest = torch.where(is_pad, first, steps).cummax(dim=1).values
    return actions.gather(1, nearest[:, :, None].expand_as(actions))
