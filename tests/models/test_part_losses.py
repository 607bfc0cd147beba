"""The losses of part discovery, each on maps made by hand."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from l2r2_models.models.parts import (
    PartMaps,
    background_loss,
    draw_moves,
    entropy_loss,
    equivariance_loss,
    move,
    orthogonality_loss,
    presence_loss,
    variation_loss,
)


def maps_of(*parts):
    """`[1, K + 1, 6, 6]` hard maps; the background is what is left."""
    maps = torch.zeros(1, len(parts) + 1, 6, 6)
    for k, (rows, columns) in enumerate(parts):
        maps[0, k, rows, columns] = 1
    maps[0, -1] = 1 - maps.sum(1)[0]
    return maps


PART = (slice(0, 3), slice(0, 3))


def test_presence_wants_every_part_once_in_the_batch():
    assert presence_loss(maps_of(PART)) == pytest.approx(0)
    absent = torch.cat([maps_of(PART), maps_of(PART)], 1)[:, [0, 1, 1, 3]]
    absent[:, 1] = 0
    assert presence_loss(absent) == pytest.approx(1 / 3, abs=0.01)  # one of three is nowhere
    two = torch.cat([maps_of(PART), maps_of((slice(0, 0), slice(0, 0)))])
    assert presence_loss(two) == pytest.approx(0)  # in one of the images is enough


def test_background_wants_to_lie_at_the_edges():
    center = torch.zeros(1, 2, 7, 7)
    center[:, 1, 2:5, 2:5] = 1
    center[:, 0] = 1 - center[:, 1]
    assert background_loss(1 - center) < 0.2 < 1 < background_loss(center)


def test_variation_and_entropy():
    flat = torch.full((1, 3, 6, 6), 1 / 3)
    assert variation_loss(flat) == 0 and entropy_loss(flat) == pytest.approx(1)
    hard = maps_of(PART)
    assert entropy_loss(hard) == pytest.approx(0, abs=1e-5)
    # a 3 x 3 corner has 3 jumps along each direction, in both maps, over 5 x 6 neighbors
    assert variation_loss(hard) == pytest.approx(2 * 2 * 3 / 30)


def test_orthogonality_compares_parts_and_not_channels():
    """The axis that the authors' code mixes up: equal parts are worst, whatever their channels are."""
    equal = torch.randn(2, 1, 5).expand(2, 3, 5)
    assert orthogonality_loss(equal) == pytest.approx(1, abs=1e-5)
    assert orthogonality_loss(torch.eye(5)[None, :3]) == pytest.approx(0)
    vectors = torch.randn(1, 3, 5)
    pairs = [cosine_similarity(vectors[0, i], vectors[0, j], dim=0).abs() for i in range(3) for j in range(3) if i != j]
    assert orthogonality_loss(vectors) == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)


def test_equivariance_is_zero_for_parts_that_move_with_the_image():
    """A stage 1 that reads its maps off the pixels; and one that always finds the same place."""

    def reads(x):
        return PartMaps(x, x, x[:, :, 0], x[:, 0] > 0)

    torch.manual_seed(0)
    blob = torch.nn.functional.avg_pool2d(torch.rand(4, 3, 32, 32), 9, 1, 4)
    assert equivariance_loss(blob, blob, reads) < 1e-4
    calls = []

    def fixed(x):
        calls.append(x)
        return reads(blob)

    spot = torch.zeros(4, 3, 32, 32)
    spot[:, :, 4:12, 4:12] = 1
    blob = spot
    assert equivariance_loss(spot, spot, fixed) > 0.05 and len(calls) == 1


def test_moves_are_rotations_shifts_and_scales():
    theta = draw_moves(256)
    scale = torch.linalg.det(theta[:, :, :2]).sqrt()
    assert scale.min() > 0.79 and scale.max() < 1.26 and theta[:, :, 2].abs().max() <= 0.2
    x = torch.rand(2, 3, 16, 16)
    identity = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(2, 2, 3)
    assert torch.allclose(move(x, identity), x, atol=1e-5)
