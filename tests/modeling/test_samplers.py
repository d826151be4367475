"""Ways to denoise: the straight line of flow matching; the schedule's arithmetic is in test_diffusion.py."""

import pytest
import torch

from manipulators.errors import FeatureShapeError, InvalidConfigError
from manipulators.modeling.samplers import FlowSampler, draw_noise

PI0 = FlowSampler(1, alpha=1.5, beta=1.0, start=0.001, slope=0.999)
GR00T = FlowSampler(0, alpha=1.5, beta=1.0, start=0.999, slope=-1.0, scale=0.999)


@pytest.mark.parametrize("sampler", [PI0, GR00T], ids=["pi0", "gr00t"])
def test_the_velocity_leads_from_noise_to_actions(sampler):
    noise, actions = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    for time in (0.0, 0.25, 1.0):
        noisy, velocity = sampler.mix(actions, noise, torch.full((2,), time))
        share = time if sampler.noise_time else 1 - time
        torch.testing.assert_close(noisy, share * noise + (1 - share) * actions)
        torch.testing.assert_close(velocity, (noise - actions) * (1 if sampler.noise_time else -1))
    # A network that knows the velocity arrives, in any number of steps.
    for steps in (1, 3):
        torch.testing.assert_close(sampler.integrate(noise, lambda x, i: velocity, steps), actions)


def test_times_run_from_noise():
    assert PI0.times(4) == [1.0, 0.75, 0.5, 0.25]
    assert GR00T.times(4) == [0.0, 0.25, 0.5, 0.75]
    with pytest.raises(InvalidConfigError, match="num_steps=0 must be at least 1"):
        PI0.times(0)


def test_training_times_stay_closer_to_noise():
    """Beta(1.5, 1) has mean 0.6."""
    torch.manual_seed(0)
    toward_noise = PI0.draw_time(20000, "cpu")
    assert toward_noise.min() >= 0.001 and toward_noise.max() <= 1.0
    assert toward_noise.mean().item() == pytest.approx(0.001 + 0.999 * 0.6, abs=0.01)
    torch.manual_seed(0)
    toward_actions = GR00T.draw_time(20000, "cpu")
    assert toward_actions.mean().item() == pytest.approx(1 - 0.6 / 0.999, abs=0.01)


def test_noise_is_given_or_drawn():
    given = torch.zeros(1, 2, 3, dtype=torch.bfloat16)
    assert draw_noise((1, 2, 3), given, None, "cpu").dtype == torch.float32
    drawn = [draw_noise((1, 2, 3), None, torch.Generator().manual_seed(4), "cpu") for _ in range(2)]
    assert torch.equal(*drawn)
    with pytest.raises(FeatureShapeError, match=r"noise has shape \(1, 2, 3\); expected \(1, 2, 4\)"):
        draw_noise((1, 2, 4), given, None, "cpu")
