"""The queue and the running average, against numbers worked out by hand and an average that stores everything."""

import math

import pytest
import torch

from manipulators.inference.action_sources import ActionQueue, TemporalEnsembler


def chunk(*values):
    """A chunk (1, h, 1)."""
    return torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1)


def test_queue_hands_out_the_first_steps_of_each_chunk():
    queue = ActionQueue(2)
    assert queue.queued == 0
    queue.push(chunk(1, 2, 3))
    assert queue.queued == 2
    assert [queue.pop().item(), queue.pop().item()] == [1, 2]
    assert queue.queued == 0
    queue.push(chunk(4, 5, 6))
    assert queue.pop().item() == 4


def test_queue_keeps_the_batch():
    queue = ActionQueue(1)
    queue.push(torch.arange(12.0).reshape(2, 3, 2))
    assert queue.pop().tolist() == [[0, 1], [6, 7]]


def test_queue_forgets():
    queue = ActionQueue(3)
    queue.push(chunk(1, 2, 3))
    queue.reset()
    assert queue.queued == 0


def test_average_by_hand():
    """With m = ln 2 the weights are 1, 1/2, 1/4, the oldest prediction first."""
    ensembler = TemporalEnsembler(math.log(2), horizon=3)
    actions = []
    for new in (chunk(0, 10, 20), chunk(40, 50, 60), chunk(80, 90, 100), chunk(7, 7, 7)):
        ensembler.push(new)
        actions.append(ensembler.pop().item())
    expected = [0, (10 + 40 / 2) / 1.5, (20 + 50 / 2 + 80 / 4) / 1.75, (60 + 90 / 2 + 7 / 4) / 1.75]
    assert actions == pytest.approx(expected)


class StoresEverything:
    """The paper's average, written down plainly."""

    def __init__(self, coefficient):
        self.coefficient, self.chunks, self.step = coefficient, [], 0

    def __call__(self, new):
        self.chunks.append((self.step, new))
        said = [c[:, self.step - start] for start, c in self.chunks if self.step - start < c.shape[1]]
        weights = torch.tensor([math.exp(-self.coefficient * i) for i in range(len(said))])
        self.step += 1
        return (torch.stack(said) * weights[:, None, None]).sum(0) / weights.sum()


@pytest.mark.parametrize("coefficient", [0.01, 0.0, 1.0, -0.3])
@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_average_equals_one_that_stores_everything(coefficient, horizon):
    generator = torch.Generator().manual_seed(0)
    ensembler, plain = TemporalEnsembler(coefficient, horizon), StoresEverything(coefficient)
    for _ in range(12):
        new = torch.randn(2, horizon, 3, generator=generator)
        before = new.clone()
        ensembler.push(new)
        torch.testing.assert_close(ensembler.pop(), plain(new), atol=1e-5, rtol=1e-5)
        assert torch.equal(new, before) and ensembler.queued == 0


def test_average_forgets():
    ensembler = TemporalEnsembler(0.01, 3)
    ensembler.push(chunk(100, 100, 100))
    ensembler.pop()
    ensembler.reset()
    ensembler.push(chunk(1, 2, 3))
    assert ensembler.pop().item() == 1
