"""Statistics of relative actions come from the differences, and padded steps do not count."""

import torch

from manipulators.training.runs.relative_statistics import relative_action_statistics


class Samples:
    """Two frames of an episode with actions 10 and 20; the second frame's second step lies beyond its end."""

    samples = (
        {"state": [1.0], "action": [[10.0, 1.0], [20.0, 1.0]], "pad": [False, False]},
        {"state": [5.0], "action": [[20.0, 1.0], [999.0, 1.0]], "pad": [False, True]},
    )

    def __len__(self):
        return len(self.samples)

    def __getitems__(self, indices):
        return [
            {
                "observation.state": torch.tensor(self.samples[i]["state"]),
                "action": torch.tensor(self.samples[i]["action"]),
                "action_is_pad": torch.tensor(self.samples[i]["pad"]),
            }
            for i in indices
        ]


def test_the_differences_are_described():
    statistics = relative_action_statistics([Samples()], [0, None])  # differences: 9, 19, 15
    assert statistics["min"].tolist() == [9.0, 1.0]
    assert statistics["max"].tolist() == [19.0, 1.0]
    assert abs(statistics["mean"][0] - 43 / 3) < 1e-5
    assert statistics["std"][1] == 0.0
