"""What a loss is averaged over."""

import math

import pytest
import torch

from manipulators.errors import InvalidConfigError
from manipulators.modeling.losses import fill_padded, mean_over

VALUES = torch.tensor([[[1.0, 2.0], [30.0, 40.0]], [[5.0, 6.0], [7.0, 8.0]]])
IS_PAD = torch.tensor([[False, True], [False, False]])
FIRST_ONLY = torch.tensor([True, False])  # of two dimensions, as a mask that expands


@pytest.mark.parametrize(
    ("over", "is_pad", "mask", "expected"),
    [
        ("real", None, None, 99 / 8),
        ("real", IS_PAD, None, (1 + 2 + 5 + 6 + 7 + 8) / 6),
        ("real", IS_PAD, FIRST_ONLY, (1 + 5 + 7) / 3),
        ("real", None, FIRST_ONLY, (1 + 30 + 5 + 7) / 4),
        ("steps", IS_PAD, FIRST_ONLY, (1 + 30 + 5 + 7) / 4),
        ("all", IS_PAD, FIRST_ONLY, 99 / 8),
    ],
)
def test_mean_over(over, is_pad, mask, expected):
    assert mean_over(VALUES, is_pad, mask, over) == pytest.approx(expected)
    if mask is not None:
        assert mean_over(VALUES, is_pad, mask.expand_as(VALUES).float(), over) == pytest.approx(expected)


def test_mean_of_nothing_is_zero():
    assert mean_over(torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)) == 0


def test_mean_ignores_whatever_padding_holds():
    values = torch.tensor([[[1.0], [math.nan], [math.inf]]], requires_grad=True)
    mean = mean_over(values, torch.tensor([[False, True, True]]))
    mean.backward()
    assert mean == 1
    assert values.grad.flatten().tolist() == [1, 0, 0]


def test_another_word_is_refused():
    with pytest.raises(InvalidConfigError, match=r"loss_over='step' is not known.*steps"):
        mean_over(VALUES, over="step")


def test_padded_steps_repeat_the_nearest_real_one():
    actions = torch.arange(8.0).view(2, 4, 1)
    is_pad = torch.tensor([[False, False, True, True], [True, True, False, True]])
    assert fill_padded(actions, is_pad).flatten().tolist() == [0, 1, 1, 1, 6, 6, 6, 6]
