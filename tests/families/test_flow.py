"""Flows: change of variables by hand and by autograd, densities by quadrature, samples by goodness of fit.

Identities hold in float64 to 1e-9; densities of trained flows integrate to one within 1e-3; samples are accepted at a
level of 1e-3.
"""

import copy
import gc
import math
import re
import weakref
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import jittered
from pyro import poutine
from pyro.distributions import transforms as pyro_transforms
from pyro.nn import AutoRegressiveNN, ConditionalDenseNN, DenseNN
from scipy import stats
from torch import nn
from torch.autograd.functional import jacobian

import dgm_pyro as dgm
from dgm_pyro.families.conditionals import Uniform
from dgm_pyro.families.flow import iaf, maf, nsf, nsf_autoregressive, realnvp
from dgm_pyro.networks import (
    MADE,
    MLP,
    ActNorm,
    Affine,
    Coupling,
    Elementwise,
    Inverse,
    LULinear,
    MaskedAutoregressive,
    NormalCDF,
    Permutation,
    RationalQuadraticSpline,
    Sigmoid,
)

pytestmark = pytest.mark.usefixtures("float64")

IMAGE = (1, 2, 2)


def coupling(passes=(True, False), univariate=None, **context):
    univariate = univariate or Affine()
    passing = sum(passes)
    outputs = univariate.num_parameters * (len(passes) - passing)
    return Coupling(passes, univariate, MLP((passing,), outputs, (8,), **context))


def spline_coupling():
    return pyro_transforms.SplineCoupling(4, 2, DenseNN(2, [8], [2 * 4, 2 * 4, 2 * 3, 2 * 4]), 4)


FLOWS = {
    "realnvp": lambda: realnvp(3, layers=3, hidden=(8,)),
    "realnvp-image": lambda: realnvp(IMAGE, layers=3, hidden=(8,)),
    "maf": lambda: maf(3, layers=2, hidden=(8,)),
    "iaf-image": lambda: iaf(IMAGE, layers=2, hidden=(8,)),
    "nsf": lambda: nsf(4, layers=2, hidden=(8,), bins=4),
    "nsf-autoregressive": lambda: nsf_autoregressive(IMAGE, layers=2, hidden=(8,), bins=4),
    "unit": lambda: nsf(3, layers=2, hidden=(8,), bins=4, unit_cube=True),
    "given-vector": lambda: maf(3, layers=2, hidden=(8,), given_shape=(2,)),
    "given-image": lambda: nsf(IMAGE, layers=2, hidden=(8,), bins=3, given_shape=(1, 3, 3)),
    "given-label": lambda: realnvp(3, layers=2, hidden=(8,), num_classes=4),
    "given-directly": lambda: dgm.Flow(
        2, [coupling(given_shape=(3,)), Permutation((1, 0)), coupling(num_classes=None)]
    ),
    "given-label-directly": lambda: dgm.Flow(2, [Elementwise(2, Affine(), nn_embedding())]),
    "base-given": lambda: dgm.Flow(2, [coupling()], dgm.Normal(2, nn.Linear(3, 4)), given_shape=(3,)),
    "base-learned": lambda: dgm.Flow(2, [coupling()], dgm.Normal(2, learned=True)),
    "pieces": lambda: dgm.Flow(
        4,
        [
            LULinear(4),
            coupling((True, False, True, False), RationalQuadraticSpline(3)),
            Permutation((3, 0, 1, 2)),
            Inverse(coupling((True, True, False, False))),
            ActNorm(4),
            Elementwise(4, Affine()),
            Sigmoid(),
        ],
    ),
    "cube-to-cube": lambda: dgm.Flow(
        2,
        [MaskedAutoregressive(unit := RationalQuadraticSpline(4, 0, 1, "linear"), MADE(2, unit.num_parameters, (8,)))],
        base=Uniform(2),
    ),
    "pyro": lambda: dgm.Flow(
        4,
        [
            pyro_transforms.AffineCoupling(2, DenseNN(2, [8], [2, 2])),
            pyro_transforms.Permute(torch.tensor([2, 0, 3, 1])),
            pyro_transforms.Spline(4, count_bins=4),
            coupling((True, False, True, False)),
            spline_coupling(),
            pyro_transforms.AffineAutoregressive(AutoRegressiveNN(4, [8])),
        ],
    ),
    "pyro-inverse-and-composed": lambda: dgm.Flow(
        4,
        [
            pyro_transforms.AffineAutoregressive(AutoRegressiveNN(4, [8])).inv,
            pyro_transforms.ComposeTransformModule(
                [pyro_transforms.Spline(4, count_bins=4), pyro_transforms.AffineCoupling(2, DenseNN(2, [8], [2, 2]))]
            ),
        ],
    ),
    "pyro-given-vector": lambda: dgm.Flow(
        4,
        [
            pyro_transforms.ConditionalAffineCoupling(2, ConditionalDenseNN(2, 3, [8], [2, 2])),
            coupling((True, False, True, False), given_shape=(3,)),
            pyro_transforms.ConditionalSpline(DenseNN(3, [8], [16, 16, 12, 16]), 4, 4),
        ],
    ),
    "pyro-reshaped": lambda: dgm.Flow(
        IMAGE, [pyro_transforms.Spline(4, count_bins=4), pyro_transforms.ReshapeTransform((4,), IMAGE)]
    ),
    "pyro-positive": lambda: dgm.Flow(2, [coupling(), dist.transforms.ExpTransform()]),
}


def nn_embedding():
    return MLP((), 4, (8,), num_classes=3)


@pytest.fixture(params=FLOWS, name="case")
def _case(request):
    """A flow off its symmetric start, in evaluation mode, and a given for it."""
    flow = jittered(FLOWS[request.param]()).eval()
    return flow, given_for(flow, 6)


def given_for(flow, size):
    if not flow.conditional:
        return None
    if flow.num_classes is not None:
        return torch.arange(size) % flow.num_classes
    return torch.randn(size, *flow.given_shape)


def rows(given):
    return [None] * 6 if given is None else list(given.split(1))


# -- the change of variables -------------------------------------------------------------------------------------------


def test_maps_are_inverse_to_each_other(case):
    flow, given = case
    x = flow.sample(6, given)
    z = flow.inverse_map(x, given)
    assert x.shape == (6, *flow.event_shape)
    assert z.shape == (6, *flow.base.event_shape)
    torch.testing.assert_close(flow.forward_map(z, given), x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(flow.inverse_map(flow.forward_map(z, given), given), z, rtol=1e-8, atol=1e-8)


def test_log_prob_is_the_change_of_variables_by_hand(case):
    flow, given = case
    x = flow.sample(6, given)
    z = flow.inverse_map(x, given)
    log_det = flow.log_abs_det_jacobian(z, x, given)
    base = flow.base.exact_log_prob(z, given if flow.base.conditional else None)
    assert log_det.shape == (6,)
    torch.testing.assert_close(flow.log_prob(x, given), base - log_det, rtol=1e-8, atol=1e-8)


def test_log_determinants_are_those_of_autograd_in_both_directions(case):
    flow, given = case
    x = flow.sample(6, given)
    z = flow.inverse_map(x, given)
    log_det = flow.log_abs_det_jacobian(z, x, given)
    for value, map, sign in ((z, flow.forward_map, 1), (x, flow.inverse_map, -1)):
        matrices = torch.stack(
            [
                jacobian(lambda v, c=c, map=map: map(v.unsqueeze(0), c).flatten(), row).flatten(1)
                for row, c in zip(value, rows(given), strict=True)
            ]
        )
        torch.testing.assert_close(sign * matrices.slogdet()[1], log_det, rtol=1e-7, atol=1e-7)


def test_samples_are_reparameterized_and_lie_in_the_support(case):
    flow, given = case
    distribution = flow(given)
    assert distribution.has_rsample
    x = distribution.rsample() if given is not None else distribution.rsample((6,))
    assert distribution.support.check(x).all()
    assert distribution.event_shape == flow.event_shape
    trainable = [p for p in flow.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(x.sum(), trainable, allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in gradients)


def test_every_parameter_gets_a_gradient(case):
    flow, _ = case
    given = given_for(flow, 64)
    x = flow.sample(64, given)
    flow.log_prob(x, given).sum().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_a_used_flow_can_be_copied(case):
    flow, given = case
    x = flow.sample(6, given).requires_grad_()
    before = flow.log_prob(x, given)
    twin = copy.deepcopy(flow)
    assert torch.equal(twin.log_prob(x, given), before)
    assert (
        twin.on_unit_cube
        == flow.on_unit_cube
        == (flow(given).support.base_constraint is dist.constraints.unit_interval)
    )


@pytest.mark.parametrize("name", ["realnvp", "maf", "iaf-image", "nsf", "nsf-autoregressive"])
def test_stacks_start_near_the_identity(name):
    flow = FLOWS[name]()
    z = torch.randn(100, *flow.event_shape)
    assert (flow.forward_map(z) - z).abs().max() < 0.2
    assert not torch.equal(flow.forward_map(z), z)


# -- normalized densities, and samples that follow them ----------------------------------------------------------------


def moons(size):
    angle = math.pi * torch.rand(size)
    side = torch.randint(2, (size,)).double()
    x = torch.stack((torch.cos(angle) + side - 0.5, (1 - 2 * side) * (torch.sin(angle) - 0.25)), -1)
    return (x + 0.15 * torch.randn(size, 2)) / torch.tensor([0.9, 0.55])


def bumps(size):
    return torch.where(torch.rand(size, 1) < 0.3, -1.0 + 0.2 * torch.randn(size, 1), 0.8 + 0.5 * torch.randn(size, 1))


def trained(flow, data, steps=200):
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -flow.log_prob(data(128)).mean()
        loss.backward()
        optimizer.step()
    return flow.eval()


LINE = {
    "maf": lambda: maf(1, layers=2, hidden=(8,)),
    "nsf-autoregressive": lambda: nsf_autoregressive(1, layers=1, hidden=(8,)),
    "spline": lambda: dgm.Flow(1, [Elementwise(1, RationalQuadraticSpline(8, -3.0, 3.0, "linear"))]),
    "pyro-spline": lambda: dgm.Flow(1, [pyro_transforms.Spline(1)]),
    "unit": lambda: dgm.Flow(
        1, [Elementwise(1, RationalQuadraticSpline()), NormalCDF(), Inverse(Sigmoid()), Elementwise(1, Affine())]
    ),
}


@pytest.mark.parametrize("make", LINE.values(), ids=LINE)
def test_on_the_line_trained_densities_integrate_to_one_and_samples_follow_them(make):
    flow = trained(make(), bumps)
    grid = torch.linspace(-12, 12, 48_001)
    with torch.no_grad():
        density = flow.log_prob(grid.unsqueeze(-1)).exp()
    cdf = torch.cat((torch.zeros(1), torch.cumulative_trapezoid(density, grid)))
    assert cdf[-1] == pytest.approx(1.0, abs=1e-4)
    x = flow.sample(4000).squeeze(-1).numpy()
    result = stats.kstest(
        x, lambda v: torch.tensor(cdf.numpy())[((torch.tensor(v) + 12) / 5e-4).round().long()].numpy()
    )
    assert result.pvalue > 1e-3


PLANE = {
    "realnvp": lambda: realnvp(2, layers=6, hidden=(16,)),
    "maf": lambda: maf(2, layers=3, hidden=(16,)),
    "iaf": lambda: iaf(2, layers=2, hidden=(16,)),
    "nsf": lambda: nsf(2, layers=2, hidden=(16,)),
    "nsf-autoregressive": lambda: nsf_autoregressive(2, layers=2, hidden=(16,)),
    "pieces": lambda: dgm.Flow(2, [coupling(), LULinear(2), ActNorm(2), coupling((False, True)), ActNorm(2)]),
}


@pytest.mark.parametrize("make", PLANE.values(), ids=PLANE)
def test_in_the_plane_trained_densities_integrate_to_one_and_samples_follow_them(make):
    flow = trained(make(), moons)
    side, cells = 400, 10
    line = (torch.arange(side) + 0.5) / side * 12 - 6
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        density = torch.cat([flow.log_prob(part).exp() for part in grid.split(50_000)])
    mass = density * (12 / side) ** 2
    assert mass.sum() == pytest.approx(1.0, abs=1e-3)

    # chi-square on cells of the middle, where the data are, and one cell for what is outside
    def counts(points, weights):
        cell = ((points + 2.5) / 5 * cells).floor().long()
        inside = ((cell >= 0) & (cell < cells)).all(-1)
        index = torch.where(inside, cell[:, 0] * cells + cell[:, 1], cells**2)
        return torch.zeros(cells**2 + 1).index_add(0, index, weights)

    samples = 4000
    expected = samples * counts(grid, mass) / mass.sum()
    observed = counts(flow.sample(samples), torch.ones(samples))
    common = expected >= 5
    expected = torch.cat((expected[common], expected[~common].sum().reshape(1)))
    observed = torch.cat((observed[common], observed[~common].sum().reshape(1)))
    assert stats.chisquare(observed, expected).pvalue > 1e-3


# -- what a distribution remembers, and for how long -------------------------------------------------------------------


def calls_of(flow):
    """Counts the calls of the flow's networks."""
    count = [0]
    for module in flow.modules():
        if isinstance(module, MADE):
            module.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    return count


def test_scoring_what_was_drawn_inverts_nothing():
    flow = jittered(iaf(IMAGE, layers=3, hidden=(8,))).eval()
    count = calls_of(flow)
    distribution = flow()
    x = distribution.rsample((5,))
    drawn = distribution.log_prob(x)
    assert count == [3]
    torch.testing.assert_close(distribution.log_prob(x.detach().clone()), drawn)
    assert count == [3 + 3 * 4]


@pytest.mark.parametrize("name", ["nsf", "iaf-image", "pyro", "pyro-inverse-and-composed"])
def test_no_value_outlives_its_parameters(name):
    flow = jittered(FLOWS[name]()).eval()
    x = flow.sample(5)
    before, z = flow.log_prob(x), flow.inverse_map(x)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1)
    after = flow.log_prob(x)
    assert (after - before).abs().min() > 1e-6
    torch.testing.assert_close(after, flow.log_prob(x.clone()), rtol=0, atol=0)
    assert (flow.inverse_map(x) - z).abs().max() > 1e-6


def test_draws_without_gradients_are_scored_with_them():
    """A score-function gradient through what `sample` remembered would be zero."""
    flow = jittered(FLOWS["nsf"]()).eval()
    distribution = flow()
    x = distribution.sample((5,))
    remembered = torch.autograd.grad(distribution.log_prob(x).sum(), list(flow.parameters()))
    fresh = torch.autograd.grad(flow.log_prob(x.clone()).sum(), list(flow.parameters()))
    for one, other in zip(remembered, fresh, strict=True):
        torch.testing.assert_close(one, other)


def test_pathwise_gradients_are_those_of_the_whole_dependence():
    """d/dtheta log q(x_theta(z)) with z held, through memory, equals the derivative through the formula by hand."""
    flow = jittered(FLOWS["iaf-image"]()).eval()
    z = torch.randn(3, *IMAGE)
    distribution = flow()
    x = z
    for transform in distribution.transforms:
        x = transform(x)
    ours = torch.autograd.grad(distribution.log_prob(x).sum(), list(flow.parameters()))
    by_hand = -flow.log_abs_det_jacobian(z, x).sum()
    for one, other in zip(ours, torch.autograd.grad(by_hand, list(flow.parameters())), strict=True):
        torch.testing.assert_close(one, other)


def test_a_distribution_is_freed_with_its_graph():
    """Reference cycles would keep each step's graph until the garbage collector comes by."""
    flow = FLOWS["nsf"]()
    gc.collect()
    gc.disable()
    try:
        distribution = flow()
        distribution.log_prob(distribution.rsample((5,)))
        step = weakref.ref(distribution.transforms[0])
        del distribution
        assert step() is None
    finally:
        gc.enable()


def test_an_iaf_encoder_scores_its_draws_as_anyone_would():
    vae = dgm.VAE(
        dgm.Normal(3),
        dgm.Normal(5, nn.Linear(3, 10)),
        jittered(iaf(3, layers=2, hidden=(8,), given_shape=(5,))).eval(),
    )
    x = torch.randn(4, 5)
    count = calls_of(vae)
    trace = poutine.trace(vae.guide).get_trace(x)
    trace.compute_log_prob()
    assert count == [2]
    site = trace.nodes["z"]
    again = vae.encoder.log_prob(site["value"].detach().clone(), given=x)
    torch.testing.assert_close(site["log_prob"], again, rtol=1e-9, atol=1e-9)


def test_an_iaf_encoder_trains_a_vae():
    vae = dgm.VAE(dgm.Normal(2), dgm.Normal(3, nn.Linear(2, 6)), iaf(2, hidden=(8,), given_shape=(3,)))
    x = torch.randn(64, 3) * torch.tensor([1.0, 2.0, 0.3])
    before = vae.log_weights(x, num_particles=20).mean()
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), pyro.infer.Trace_ELBO())
    for _ in range(80):
        svi.step(x)
    assert vae.log_weights(x, num_particles=20).mean() > before + 0.3


# -- given -------------------------------------------------------------------------------------------------------------

CONDITIONAL = [name for name in FLOWS if "given" in name]


@pytest.mark.parametrize("name", CONDITIONAL)
def test_given_matters_and_each_datum_sees_its_own(name):
    flow = jittered(FLOWS[name]()).eval()
    given = given_for(flow, 6)
    x = flow.sample(6, given)
    together = flow.log_prob(x, given)
    for i in range(6):
        torch.testing.assert_close(flow.log_prob(x[i : i + 1], given[i : i + 1]), together[i : i + 1])
    others = flow.log_prob(x, given.roll(1, 0))
    assert (others - together).abs().min() > 1e-6


@pytest.mark.parametrize("name", CONDITIONAL)
def test_given_and_x_broadcast_over_particles_and_enumeration(name):
    flow = jittered(FLOWS[name]()).eval()
    given = given_for(flow, 3)
    x = torch.stack([flow.sample(3, given) for _ in range(2)])  # (particles, data)
    for form in (flow(given).log_prob(x), flow.exact_log_prob(x, given)):
        assert form.shape == (2, 3)
        torch.testing.assert_close(form, torch.stack([flow.log_prob(part, given) for part in x]))
    every = given[:2].unsqueeze(1)  # (choices, 1)
    form = flow(every).log_prob(x[0])
    assert form.shape == (2, 3)
    for i in range(2):
        torch.testing.assert_close(form[i], flow.log_prob(x[0], given[i : i + 1].expand(3, *given.shape[1:])))


def test_given_may_be_integers_that_the_embedding_scales():
    flow = jittered(iaf(2, hidden=(8,), given_shape=IMAGE, given_levels=5)).eval()
    given = torch.randint(5, (3, *IMAGE), dtype=torch.uint8)
    x = flow.sample(3, given)
    torch.testing.assert_close(flow.log_prob(x, given), flow.log_prob(x, given.long()))


def test_an_embedding_may_read_a_pair():
    network = MLP((3,), 5, (8,), num_classes=4)
    flow = jittered(dgm.Flow(2, [coupling(given_shape=(5,))], embedding=network)).eval()
    given = (torch.randn(6, 3), torch.arange(6) % 4)
    x = flow.sample(6, given)
    assert (flow.log_prob(x, given) != flow.log_prob(x, (given[0], given[1].flip(0)))).any()
    assert (flow.log_prob(x, given) != flow.log_prob(x, (given[0].flip(0), given[1]))).any()


def test_an_embedding_that_does_not_say_what_it_reads_is_told_by_its_owner():
    flow = dgm.Flow(2, [coupling(given_shape=(5,))], embedding=nn.Sequential(nn.Linear(3, 5), nn.Tanh()))
    assert (flow.conditional, flow.given_shape) == (True, None)
    dgm.VAE(dgm.Normal(2), dgm.Normal(3, nn.Linear(2, 6)), flow)
    assert flow.given_shape == (3,)
    assert flow(torch.zeros(7, 6, 3)).batch_shape == (7, 6)
    assert dgm.Flow(2, flow.transforms, embedding=flow.embedding, given_shape=(3,)).given_shape == (3,)


def test_a_base_without_a_given_shape_learns_it_from_its_flow():
    flow = dgm.Flow(2, [coupling()], dgm.Normal(2, nn.Linear(3, 4)))
    dgm.VAE(dgm.Normal(2), dgm.Normal(3, nn.Linear(2, 6)), flow)
    assert flow(torch.zeros(7, 6, 3)).batch_shape == (7, 6)


# -- export ------------------------------------------------------------------------------------------------------------


class Scored(nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x, given=None):
        return self.flow(given).log_prob(x)


@pytest.mark.parametrize("name", ["nsf-autoregressive", "unit", "given-label"])
def test_the_density_exports_with_a_free_batch_size_and_trains_the_same_parameters(name):
    flow = jittered(FLOWS[name]()).eval()
    arguments = lambda size: (flow.sample(size, given_for(flow, size)), given_for(flow, size))  # noqa: E731
    batch = {0: torch.export.Dim("batch", min=2)}
    shapes = {"x": batch, "given": batch if flow.conditional else None}
    with pyro.validation_enabled(False):
        exported = torch.export.export(Scored(flow), arguments(4), strict=False, dynamic_shapes=shapes).module()
    x, given = arguments(7)
    for _ in range(2):
        torch.testing.assert_close(exported(x, given), flow.log_prob(x, given))
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.mul_(0.9)


# -- ActNorm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [True, False])
def test_actnorm_starts_from_data_pulled_through_what_follows_it(explicit):
    flow = dgm.Flow(2, [ActNorm(2), Elementwise(2, Affine()), ActNorm(2)])
    x = 5 + 3 * torch.randn(500, 2)
    if explicit:
        flow.eval().initialize(x)
    else:
        flow.log_prob(x)
    z = flow.eval().inverse_map(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(2), rtol=0, atol=1e-9)
    torch.testing.assert_close(z.std(0), torch.ones(2))
    assert all(part.initialized for part in flow.parts if isinstance(part, ActNorm))


# -- Pyro's transforms -------------------------------------------------------------------------------------------------


def test_parameters_of_wrapped_transforms_are_found():
    flow = FLOWS["pyro-inverse-and-composed"]()
    inner = flow.transforms[0].inv
    assert {id(p) for p in inner.parameters()} < {id(p) for p in flow.parameters()}


def test_transforms_keep_no_memory_of_their_use_in_a_flow():
    spline = pyro_transforms.Spline(4)
    flow = dgm.Flow(4, [spline])
    flow.log_prob(torch.randn(3, 4))
    assert spline._cached_x_y == (None, None)


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: t.inv, lambda t: dist.transforms.ComposeTransform([t])])
def test_tensors_of_transforms_that_are_no_modules_go_where_the_flow_goes(wrap):
    shift, scale = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
    affine = dist.transforms.AffineTransform(shift.float(), scale.float(), event_dim=1)
    permute = pyro_transforms.Permute(torch.tensor([2, 0, 3, 1]))
    flow = dgm.Flow(4, [wrap(affine), permute])
    x = torch.randn(3, 4, dtype=torch.float64)
    flow.double().log_prob(x)
    assert (affine.loc.dtype, affine.scale.dtype, permute.permutation.dtype) == (x.dtype, x.dtype, torch.int64)
    flow.to("meta")
    tensors = affine.loc, affine.scale, permute.permutation, permute.inv_permutation
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_flow_may_be_built_of_transforms_in_another_precision(float64):
    flow = dgm.Flow(4, [pyro_transforms.AffineCoupling(2, DenseNN(2, [8], [2, 2])).float()], dgm.Normal(4).float())
    assert flow.log_prob(torch.randn(3, 4, dtype=torch.float32)).dtype == torch.float32


ONE_WAY = {
    "planar": lambda: pyro_transforms.Planar(2),
    "radial": lambda: pyro_transforms.Radial(2),
    "sylvester": lambda: pyro_transforms.Sylvester(2),
    "polynomial": lambda: pyro_transforms.polynomial(2),
    "block-autoregressive": lambda: pyro_transforms.BlockAutoregressive(2),
    "neural-autoregressive": lambda: pyro_transforms.neural_autoregressive(2),
    "conditional-planar": lambda: pyro_transforms.conditional_planar(2, 3),
    "conditional-radial": lambda: pyro_transforms.conditional_radial(2, 3),
    "inverse-planar": lambda: pyro_transforms.Planar(2).inv,
    "composed-planar": lambda: pyro_transforms.ComposeTransformModule([pyro_transforms.Planar(2)]),
    "absolute": lambda: dist.transforms.AbsTransform(),
}


@pytest.mark.parametrize("make", ONE_WAY.values(), ids=ONE_WAY)
def test_what_cannot_be_inverted_is_refused_when_the_flow_is_built(make):
    with pytest.raises(ValueError, match=r"transforms\[1\].*has no inverse.*Coupling.*MaskedAutoregressive.*Spline"):
        dgm.Flow(2, [coupling(), make()])


class Making(nn.Module):
    """What zuko calls a lazy transform: a module that makes an affine transform from x to z of its parameters."""

    def __init__(self):
        super().__init__()
        self.shift, self.log_scale = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))

    def forward(self):
        return Closure(lambda: dist.transforms.AffineTransform(self.shift, self.log_scale.exp(), event_dim=1))


class Closure(dist.transforms.Transform):
    """A transform that looks its parameters up in a closure, as zuko's do."""

    domain = codomain = dist.constraints.real_vector
    bijective = True

    def __init__(self, make):
        super().__init__()
        self.make = make

    def _call(self, x):
        return self.make()(x)

    def _inverse(self, z):
        return self.make().inv(z)

    def log_abs_det_jacobian(self, x, z):
        return self.make().log_abs_det_jacobian(x, z)


class ConditionalClosure(dist.ConditionalTransform):
    """A conditional transform that is no module, and has one."""

    def __init__(self):
        self.network = nn.Linear(3, 2)

    def condition(self, given):
        return dist.transforms.AffineTransform(self.network(given), 1.0, event_dim=1)


UNHELD = {
    "in-a-closure": lambda: Making()(),
    "inverse": lambda: Making()().inv,
    "composed": lambda: dist.transforms.ComposeTransform([Making()()]),
    "parameter": lambda: dist.transforms.AffineTransform(nn.Parameter(torch.zeros(2)), 1.0, event_dim=1),
    "computed": lambda: dist.transforms.AffineTransform(nn.Linear(1, 2)(torch.ones(1)), 1.0, event_dim=1),
    "conditional": ConditionalClosure,
}


@pytest.mark.parametrize("make", UNHELD.values(), ids=UNHELD)
def test_a_transform_is_refused_if_its_parameters_would_not_be_trained(make):
    with pytest.raises(ValueError, match=r"transforms\[0\].*parameters that no module.*TransformModule.*docs/flows.md"):
        dgm.Flow(2, [make()])


def documented_wrapper():
    """The class that docs/flows.md wraps foreign transforms in."""
    page = (Path(__file__).parent.parent.parent / "docs" / "flows.md").read_text()
    block = next(b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Made" in b)
    namespace = {}
    exec(block, namespace)
    return namespace["Made"]


def test_the_documented_wrapper_scores_and_trains_a_foreign_transform():
    making = Making()
    flow = dgm.Flow(2, [documented_wrapper()(making)])
    x = torch.randn(50, 2)
    by_hand = dist.Normal(0.0, 1.0).log_prob(making.shift + making.log_scale.exp() * x) + making.log_scale
    torch.testing.assert_close(flow.log_prob(x), by_hand.sum(-1))
    torch.testing.assert_close(flow.inverse_map(flow.forward_map(x)), x)
    before = [parameter.clone() for parameter in making.parameters()]
    dgm.fit(flow, x, epochs=1, validation=None, progress=False)
    assert not any(torch.equal(a, b) for a, b in zip(before, making.parameters(), strict=True))


@pytest.mark.parametrize("name", ["NSF", "MAF", "NICE", "NAF"])
def test_the_documented_wrapper_scores_as_zuko_does(name):
    zuko = pytest.importorskip("zuko")
    theirs = getattr(zuko.flows, name)(2)
    flow, x = dgm.Flow(2, [documented_wrapper()(theirs.transform)]), torch.randn(20, 2)
    torch.testing.assert_close(flow.log_prob(x), theirs().log_prob(x))
    assert {id(p) for p in flow.parameters()} == {id(p) for p in theirs.transform.parameters()}
    with pytest.raises(ValueError, match="parameters that no module"):
        dgm.Flow(2, [theirs.transform().inv])


def test_building_draws_no_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(1)
    transforms = [pyro_transforms.Spline(4)]
    torch.manual_seed(0)
    dgm.Flow(4, transforms)
    assert torch.equal(torch.rand(1), expected)


# -- bad input ---------------------------------------------------------------------------------------------------------

GOOD = lambda: dgm.Flow(2, [coupling()])  # noqa: E731
GIVEN = lambda: dgm.Flow(2, [coupling(given_shape=(3,))])  # noqa: E731

BAD = {
    "event-shape": (lambda: dgm.Flow(0, []), ValueError, "event_shape must be a positive int"),
    "no-transform": (lambda: dgm.Flow(2, [nn.Linear(2, 2)]), TypeError, r"transforms\[0\] must be a bijection.*Linear"),
    "features": (lambda: dgm.Flow(3, [coupling()]), ValueError, r"transforms\[0\], Coupling, has 2 features.*\(3,\)"),
    "base-shape": (lambda: dgm.Flow(2, [Sigmoid()], dgm.Normal(3)), ValueError, r"event_shape \(3,\) to \(3,\)"),
    "base-mass": (
        lambda: dgm.Flow(2, [Sigmoid()], dgm.Bernoulli(2)),
        ValueError,
        "density on reals, .*, got Bernoulli",
    ),
    "base-type": (
        lambda: dgm.Flow(2, [Sigmoid()], nn.Linear(2, 2)),
        TypeError,
        "base must be a dgm.Program, got Linear",
    ),
    "after-sigmoid": (
        lambda: dgm.Flow(2, [Sigmoid(), coupling()]),
        ValueError,
        r"transforms\[1\], Coupling, maps the real line, but gets.*before the Sigmoid",
    ),
    "logit-of-reals": (
        lambda: dgm.Flow(2, [Inverse(Sigmoid())]),
        ValueError,
        r"transforms\[0\], Inverse, maps the unit interval.*put Sigmoid\(\) before it",
    ),
    "givens-differ": (
        lambda: dgm.Flow(2, [coupling(given_shape=(3,)), coupling(given_shape=(4,))]),
        ValueError,
        "take given of different shapes",
    ),
    "embedding-unused": (
        lambda: dgm.Flow(2, [coupling()], embedding=MLP((3,), 4, (8,))),
        ValueError,
        "no bijection takes its output",
    ),
    "embedding-size": (
        lambda: dgm.Flow(2, [coupling(given_shape=(5,))], embedding=MLP((3,), 4, (8,))).sample(2, torch.zeros(2, 3)),
        ValueError,
        r"embedding network returned shape \(2, 4\).*\(5,\)",
    ),
    "given-differs": (
        lambda: dgm.Flow(2, [coupling(given_shape=(5,))], dgm.Normal(2, MLP((3,), 4, (8,)))),
        ValueError,
        r"different shapes, \[\(3,\), \(5,\)\]",
    ),
    "given-missing": (lambda: GIVEN().sample(2), ValueError, r"is conditional: pass given, of shape \(B, \*\(3,\)\)"),
    "given-too-much": (lambda: GOOD().sample(2, torch.zeros(2, 3)), ValueError, "not conditional: leave it out"),
    "given-shape": (lambda: GIVEN().sample(2, torch.zeros(2, 4)), ValueError, r"given has shape \(2, 4\)"),
    "x-shape": (lambda: GOOD().inverse_map(torch.zeros(2, 3)), ValueError, r"x has shape \(2, 3\)"),
    "x-integers": (lambda: GOOD().log_prob(torch.zeros(2, 2).long()), TypeError, "dgm.Dequantized"),
    "x-nan": (lambda: GOOD().log_prob(torch.full((2, 2), math.nan)), ValueError, "NaN"),
    "z-shape": (lambda: GOOD().forward_map(torch.zeros(2, 3)), ValueError, r"z has shape \(2, 3\)"),
    "z-type": (lambda: GOOD().forward_map([[0.0, 0.0]]), TypeError, "z must be a torch.Tensor"),
    "layers": (lambda: realnvp(2, layers=0), ValueError, "layers must be a positive integer, got 0"),
    "one-feature": (lambda: realnvp(1), ValueError, "at least two features: use maf"),
    "bins": (lambda: nsf(2, bins=1), ValueError, "bins must be an int from 2"),
    "initialize-one": (
        lambda: dgm.Flow(2, [ActNorm(2)]).initialize(torch.zeros(1, 2)),
        ValueError,
        "x has a single datum",
    ),
    "initialize-shape": (lambda: GOOD().initialize(torch.zeros(2, 3)), ValueError, r"x has shape \(2, 3\)"),
}


@pytest.mark.parametrize(("act", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_by_name(act, error, message):
    with pytest.raises(error, match=message):
        act()
