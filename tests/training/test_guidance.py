"""Losses on explanations: exact numbers, gradients, wrong shapes."""

import pytest
import torch

import bcoskit
from bcoskit.training import energy_loss, l1_loss, matching_loss, right_reasons_loss

MAPS = torch.tensor([[[4.0, -2.0], [1.0, 3.0]], [[-1.0, -1.0], [-1.0, -1.0]]])
LEFT = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).expand(2, 2, 2)


def test_numbers():
    assert float(energy_loss(MAPS[:1], LEFT[:1])) == pytest.approx(1 - 5 / 8)
    assert float(energy_loss(MAPS[1:], LEFT[1:])) == 1.0
    assert float(energy_loss(MAPS, LEFT)) == pytest.approx((3 / 8 + 1) / 2)
    assert float(l1_loss(MAPS[:1], LEFT[:1])) == pytest.approx((0 + 0 + 0.75 + 0.75) / 4)
    assert float(right_reasons_loss(MAPS, LEFT)) == pytest.approx(((4 + 9) + 2) / 2)
    assert float(matching_loss(MAPS, 3 * MAPS)) == pytest.approx(0, abs=1e-6)
    assert float(matching_loss(MAPS, -MAPS)) == pytest.approx(2)


@pytest.mark.parametrize("loss", [energy_loss, l1_loss, right_reasons_loss])
def test_what_is_inside_alone_is_best(loss):
    inside, outside = LEFT.clone(), 1 - LEFT
    assert float(loss(inside, LEFT)) == pytest.approx(0, abs=1e-6)
    assert float(loss(outside, LEFT)) > 0.5


@pytest.mark.parametrize("loss", [energy_loss, l1_loss, right_reasons_loss, matching_loss])
def test_gradients_reach_the_weights(loss):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torch.nn.Sequential(bcoskit.nn.BcosConv2d(6, 8, 3, padding=1), bcoskit.nn.ClassifierHead(8, 3)).eval()
    x = bcoskit.encode(torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
    contributions = bcoskit.explain(network, x, create_graph=True).contributions
    assert float(contributions.detach().max()) > 0
    masks = torch.zeros(2, 6, 6)
    masks[:, :3] = 1
    loss(contributions, masks).backward()
    gradient = network[0].weight.grad
    assert gradient is not None
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().max()) > 0


def test_samples_without_positive_contributions_have_no_gradient():
    maps = MAPS[1:].clone().requires_grad_()
    energy_loss(maps, LEFT[1:]).backward()
    assert torch.equal(maps.grad, torch.zeros_like(maps))


@pytest.mark.parametrize("loss", [energy_loss, l1_loss, right_reasons_loss])
def test_masks_of_every_type(loss):
    expected = loss(MAPS, LEFT)
    for kind in (torch.bool, torch.uint8, torch.int64, torch.float64):
        torch.testing.assert_close(loss(MAPS, LEFT.to(kind)), expected)
    for masks in (255 * LEFT, -LEFT, LEFT * torch.nan):
        with pytest.raises(ValueError, match="`masks` must have values from 0 to 1"):
            loss(MAPS, masks)


def test_the_size_of_contributions_does_not_matter_to_their_match():
    other = MAPS.flip(2)
    expected = 1 - torch.cosine_similarity(MAPS.flatten(1).double(), other.flatten(1).double()).mean()
    for size in (1e-30, 1e-9, 1.0, 1e25):
        student = (MAPS * size).requires_grad_()
        loss = matching_loss(student, other / size)
        assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-6)
        loss.backward()
        assert bool(student.grad.isfinite().all())
    nothing = torch.zeros_like(MAPS, requires_grad=True)
    loss = matching_loss(nothing, other)
    loss.backward()
    assert float(loss.detach()) == 1
    assert torch.equal(nothing.grad, torch.zeros_like(MAPS))


@pytest.mark.parametrize("loss", [energy_loss, l1_loss, right_reasons_loss, matching_loss])
def test_wrong_shapes(loss):
    with pytest.raises(ValueError, match="at least one sample"):
        loss(MAPS[:0], LEFT[:0])
    with pytest.raises(ValueError, match=r"must both be \(N, H, W\)"):
        loss(MAPS, LEFT[:1])
    with pytest.raises(ValueError, match=r"must both be"):
        loss(MAPS[0], LEFT[0])
