"""Keypoints are where the heat is."""

import torch

from manipulators.modeling.layers.spatial_softmax import SpatialSoftmax, pixel_positions


def test_positions_are_x_then_y_row_by_row():
    assert pixel_positions(2, 3).tolist() == [[-1, -1], [0, -1], [1, -1], [-1, 1], [0, 1], [1, 1]]


def test_keypoint_of_a_single_hot_pixel_and_of_none():
    pool = SpatialSoftmax(channels=2, keypoints=2, size=(3, 5))
    with torch.no_grad():
        pool.nets.weight.copy_(torch.eye(2)[:, :, None, None])
    features = torch.zeros(1, 2, 3, 5)
    features[0, 0, 2, 1] = 100.0
    torch.testing.assert_close(pool(features), torch.tensor([[[-0.5, 1.0], [0.0, 0.0]]]), atol=1e-6, rtol=0)


def test_another_size_of_feature_map():
    pool = SpatialSoftmax(channels=2, keypoints=2, size=(3, 5))
    features = torch.randn(1, 2, 4, 4)
    other = SpatialSoftmax(channels=2, keypoints=2, size=(4, 4))
    other.nets.load_state_dict(pool.nets.state_dict())
    torch.testing.assert_close(pool(features), other(features))
