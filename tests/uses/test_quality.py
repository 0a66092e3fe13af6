"""Sample quality against closed forms, a sum written out, and supports that are known."""

import math

import pytest
import torch
from torch import nn

import dgm_pyro as dgm
from dgm_pyro.uses.quality import (
    MEASURES,
    frechet_distance,
    hidden_features,
    kernel_distance,
    program_quality,
    sample_quality,
)


def normals(size, seed, shift=0.0, scale=1.0, dims=3):
    random = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(size, dims, generator=random, dtype=torch.float64)


def with_moments(mean, covariance, size=200):
    """Points whose mean and covariance are exactly these."""
    x = normals(size, 0, dims=len(mean))
    x = x - x.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False)
    return mean + (torch.linalg.cholesky(covariance) @ whitened).T


def test_the_frechet_distance_is_that_of_two_normals():
    a, b = torch.tensor([2.0, 0.5, 1.0]).double(), torch.tensor([1.0, 3.0, 0.25]).double()
    turn = torch.linalg.qr(normals(3, 1)).Q
    shift = torch.tensor([1.0, -2.0, 0.5]).double()
    real = with_moments(torch.zeros(3).double(), turn * a @ turn.T)
    same_axes = with_moments(shift, turn * b @ turn.T)
    exact = shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()  # covariances that commute
    assert frechet_distance(real, same_axes) == pytest.approx(exact.item(), rel=1e-9)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)
    other_axes = with_moments(shift, torch.diag(b))
    values = torch.linalg.eigvals(turn * a @ turn.T @ torch.diag(b)).real.sqrt().sum()
    exact = shift.square().sum() + a.sum() + b.sum() - 2 * values
    assert frechet_distance(real, other_axes) == pytest.approx(exact.item(), rel=1e-9)


def test_the_kernel_distance_is_its_sum_written_out():
    real, samples = normals(5, 0), normals(4, 1, shift=0.3)
    k = lambda a, b: (float(a @ b) / 3 + 1) ** 3  # noqa: E731
    within = [
        sum(k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) / (len(x) * (len(x) - 1))
        for x in (real, samples)
    ]
    between = sum(k(a, b) for a in real for b in samples) / 20
    assert kernel_distance(real, samples) == pytest.approx(sum(within) - 2 * between, rel=1e-9)


def test_the_kernel_distance_is_unbiased_and_its_error_is_right():
    found = [sample_quality(normals(80, i), normals(80, 1000 + i)) for i in range(60)]
    values = torch.tensor([each.values["kernel"] for each in found])
    errors = torch.tensor([each.errors["kernel"] for each in found])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(60)
    assert 0.6 < errors.square().mean().sqrt() / values.std() < 2  # the jackknife is too large where it is degenerate
    frechet = torch.tensor([each.values["frechet"] for each in found])
    assert frechet.mean() > 3 * frechet.std() / math.sqrt(60), "which is biased, and says so"


def test_errors_where_the_distributions_differ():
    found = [sample_quality(normals(100, i), normals(100, 1000 + i, shift=1.0)) for i in range(60)]
    for name in MEASURES:
        values = torch.tensor([each.values[name] for each in found])
        errors = torch.tensor([each.errors[name] for each in found])
        # The balls are shared among the points, so that a share's own error is only part of it.
        least = 0.7 if name in ("frechet", "kernel") else 0.2
        assert least < errors.square().mean().sqrt() / values.std() < 1.5, name


def test_shares_on_supports_that_are_known():
    """Squares far apart: no ball reaches from one to another, and few points are in no ball of their own square."""
    random = torch.Generator().manual_seed(0)
    squares = lambda *places: torch.cat([torch.rand(400, 2, generator=random) + place for place in places])  # noqa: E731
    real = squares(0, 10)
    same, lost, strays = (sample_quality(real, squares(*places)).values for places in ((0, 10), (0, 0), (0, 20)))
    assert 0.95 < same["precision"] <= 1
    assert 0.95 < same["recall"] <= 1
    assert same["density"] == pytest.approx(1, abs=0.06)  # over seeds its standard deviation is 0.02
    assert same["coverage"] == pytest.approx(1 - 2**-5, abs=0.02)  # 0.009
    assert 0.95 < lost["precision"] <= 1
    assert 0.475 < lost["recall"] <= 0.5
    assert lost["coverage"] == pytest.approx((1 - 3**-5) / 2, abs=0.01)  # twice as many samples as data in the square
    assert 0.475 < strays["precision"] <= 0.5
    assert sample_quality(real, squares(20)).values["precision"] == 0


def test_balls_counted_by_hand():
    """On a line, k = 1: the balls of 0, 1, 3 reach 1, 1, 2; those of 0.5, 10, 11 reach 9.5, 1, 1."""
    real, fake = torch.tensor([[0.0], [1.0], [3.0]]).repeat(2, 1), torch.tensor([[0.5], [10.0], [11.0]]).repeat(2, 1)
    # Every point is there twice, so that the second neighbor is the nearest other one.
    values = sample_quality(real, fake, neighbors=2, num_blocks=2).values
    assert values["precision"] == pytest.approx(1 / 3)
    assert values["recall"] == pytest.approx(1.0)
    assert values["density"] == pytest.approx(2 * 2 / 3 / 2)  # 0.5 is in the balls of 0 and of 1, each there twice
    assert values["coverage"] == pytest.approx(2 / 3)


def test_features_are_those_of_a_network_in_evaluation_mode():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3).double(), nn.Dropout(0.5))
    real, samples = normals(60, 0, dims=4).reshape(60, 1, 2, 2), normals(60, 1, dims=4).reshape(60, 1, 2, 2)
    found = sample_quality(real, samples, network, batch_size=7)
    assert network.training
    by_hand = [network[1](x.flatten(1)).detach() for x in (real, samples)]
    assert found == sample_quality(*by_hand)
    assert found.num_features == 3


def test_a_program_that_is_the_truth_beats_one_that_is_not():
    data = normals(400, 0, dims=2).float()
    right, wrong = dgm.Normal(2), dgm.Normal(2, parameters=torch.tensor([[2.0, 2.0], [0.5, 0.5]]))
    state = torch.get_rng_state()
    found, other = program_quality(right, data), program_quality(wrong, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert found == program_quality(right, data)
    assert abs(found.values["kernel"]) < 3 * found.errors["kernel"]
    assert other.values["kernel"] > 3 * other.errors["kernel"]
    assert "frechet" in str(found)
    assert found.as_dict()["num_samples"] == 400


def test_hidden_features_are_what_the_last_layer_reads():
    network = dgm.networks.ConvEncoder((1, 8, 8), 3, (4,), width=5, dropout=0.5)
    x = torch.randn(6, 1, 8, 8)
    hidden = hidden_features(network)(x)
    assert hidden.shape == (6, 5)
    with torch.no_grad():
        torch.testing.assert_close(network.last[-1](hidden), network.eval()(x))
    with pytest.raises(ValueError, match="no linear layer"):
        hidden_features(nn.Flatten())


def test_too_few():
    with pytest.raises(
        ValueError, match="9 real data and 30 samples, but 5 neighbors and 10 blocks need at least 20 of each"
    ):
        sample_quality(torch.randn(9, 2), torch.randn(30, 2))
