"""Bijections: inverses by round trips, log-determinants by autograd, splines by a scalar reference and by their knots.

Identities hold in float64 to 1e-9 unless a tolerance is stated.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.functional import jacobian

from dgm_pyro.networks import (
    MADE,
    MLP,
    ActNorm,
    Affine,
    Contraction,
    ConvNet,
    Coupling,
    Elementwise,
    Inverse,
    LogisticMixture,
    LULinear,
    MaskedAutoregressive,
    NormalCDF,
    Partial,
    Permutation,
    PerPixel,
    RationalQuadraticSpline,
    Sigmoid,
    Squeeze,
)

pytestmark = pytest.mark.usefixtures("float64")

D, BATCH = 4, 6
HALF = (True, False, False, True)


def spline(low=-3.0, high=3.0, tails="identity"):
    return RationalQuadraticSpline(5, low, high, tails)


def coupling(univariate, **context):
    return Coupling(HALF, univariate, MLP((2,), 2 * univariate.num_parameters, (8,), **context))


def autoregressive(univariate, **options):
    return MaskedAutoregressive(univariate, MADE(D, univariate.num_parameters, (8,), activation="tanh", **options))


def convolutional(shape, **context):
    """A coupling of the second channel, by a network of the first."""
    one = (1, *shape[1:])
    return Coupling((True, True, False, False), Affine(), ConvNet(one, one, 2, 4, **context))


BIJECTIONS = {
    "elementwise-affine": lambda: Elementwise(D, Affine()),
    "elementwise-spline": lambda: Elementwise(D, spline()),
    "elementwise-spline-linear-tails": lambda: Elementwise(D, spline(tails="linear")),
    "elementwise-spline-unit": lambda: Elementwise(D, spline(0, 1, "linear")),
    "elementwise-given-vector": lambda: Elementwise(D, Affine(), MLP((3,), 2 * D, (8,))),
    "elementwise-given-label": lambda: Elementwise(D, spline(), MLP((), 14 * D, (8,), num_classes=3)),
    "coupling-affine": lambda: coupling(Affine()),
    "coupling-linear-network": lambda: Coupling(HALF, Affine(), nn.Linear(2, 4)),
    "coupling-spline": lambda: coupling(spline()),
    "coupling-spline-unit": lambda: coupling(spline(0, 1)),
    "coupling-given-vector": lambda: coupling(Affine(), given_shape=(3,)),
    "coupling-given-image": lambda: coupling(Affine(), given_shape=(1, 2, 2)),
    "coupling-given-label": lambda: coupling(spline(), num_classes=3),
    "maf": lambda: autoregressive(Affine()),
    "maf-spline": lambda: autoregressive(spline()),
    "maf-order": lambda: autoregressive(Affine(), order=(2, 0, 3, 1)),
    "maf-given-vector": lambda: autoregressive(spline(), given_shape=(3,)),
    "maf-given-label": lambda: autoregressive(Affine(), num_classes=3),
    "maf-image": lambda: MaskedAutoregressive(Affine(), MADE((1, 2, 2), 2, (8,))),
    "iaf": lambda: Inverse(autoregressive(Affine())),
    "iaf-spline-given-vector": lambda: Inverse(autoregressive(spline(), given_shape=(3,))),
    "permutation": lambda: Permutation((2, 0, 3, 1)),
    "lu": lambda: LULinear(D),
    "actnorm": lambda: ActNorm(D),
    "sigmoid": lambda: Sigmoid(),
    "logit": lambda: Inverse(Sigmoid()),
    "normal-cdf": lambda: NormalCDF(),
    "coupling-logistic-mixture": lambda: coupling(LogisticMixture(3)),
    "coupling-of-images": lambda: convolutional((2, 1, 2)),
    "coupling-of-images-given-image": lambda: convolutional((2, 1, 2), given_shape=(3, 1, 2)),
    "coupling-of-images-given-label": lambda: convolutional((2, 1, 2), num_classes=3),
    "squeeze": lambda: Squeeze((1, 2, 2)),
    "lu-per-pixel": lambda: PerPixel((2, 1, 2), LULinear(2)),
    "actnorm-per-pixel": lambda: PerPixel((2, 2, 1), ActNorm(2)),
    "partial-given-vector": lambda: Partial(D, Coupling((True, False), Affine(), MLP((1,), 2, (4,), given_shape=(3,)))),
    "twice-inverse": lambda: Inverse(Inverse(coupling(Affine()))),
}


@pytest.fixture(params=BIJECTIONS, name="case")
def _case(request):
    """A bijection off its symmetric start, in evaluation mode, and a context for it."""
    bijection = BIJECTIONS[request.param]().eval()
    with torch.no_grad():
        for parameter in bijection.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return bijection, context_for(bijection)


def context_for(bijection, size=BATCH):
    if bijection.num_classes is not None:
        return torch.arange(size) % bijection.num_classes
    return None if bijection.given_shape is None else torch.randn(size, *bijection.given_shape)


def points(line, size=BATCH):
    """Points inside and outside the splines' box, or in the unit cube."""
    return torch.rand(size, D) if line == "unit" else 2.5 * torch.randn(size, D)


def jacobians(map, value, context):
    """d map / d value, one (D, D) matrix per row."""
    rows = [None] * len(value) if context is None else context.split(1)
    one = lambda v, c: jacobian(lambda v: map(v.unsqueeze(0), c)[0].squeeze(0), v)  # noqa: E731
    return torch.stack([one(v, c) for v, c in zip(value, rows, strict=True)])


# -- every bijection ---------------------------------------------------------------------------------------------------


def test_inverse_undoes_forward_and_log_determinants_cancel(case):
    bijection, context = case
    z = points(bijection.domain)
    x, forward = bijection(z, context)
    back, inverse = bijection.inverse(x, context)
    torch.testing.assert_close(back, z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse, -forward, rtol=1e-9, atol=1e-9)


def test_forward_undoes_inverse(case):
    bijection, context = case
    x = points(bijection.codomain)
    z, inverse = bijection.inverse(x, context)
    again, forward = bijection(z, context)
    torch.testing.assert_close(again, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(forward, -inverse, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_log_determinants_are_those_of_the_autograd_jacobian(case, direction):
    bijection, context = case
    map = bijection if direction == "forward" else bijection.inverse
    value = points(bijection.domain if direction == "forward" else bijection.codomain)
    _, log_det = map(value, context)
    assert log_det.shape == (BATCH,)
    torch.testing.assert_close(log_det, jacobians(map, value, context).slogdet()[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_every_parameter_gets_a_gradient(case, direction):
    bijection, _ = case
    if not list(bijection.parameters()):
        return
    map = bijection if direction == "forward" else bijection.inverse
    value = points(bijection.domain if direction == "forward" else bijection.codomain, 64)
    out, log_det = map(value, context_for(bijection, 64))
    (out.square().sum() + log_det.sum()).backward()
    for name, parameter in bijection.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_codomain_is_where_it_maps_to(case):
    bijection, context = case
    if bijection.codomain == "unit":
        x, _ = bijection(points(bijection.domain), context)
        assert ((x > 0) & (x < 1)).all()
    if bijection.domain == "unit":
        z, _ = bijection.inverse(points(bijection.codomain), context)
        assert ((z > 0) & (z < 1)).all()


@pytest.mark.parametrize("name", ["coupling-spline", "iaf", "lu", "actnorm", "normal-cdf", "sigmoid"])
def test_exports_with_a_free_batch_size(name):
    bijection = BIJECTIONS[name]().eval()

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.bijection = bijection

        def forward(self, value):
            return *self.bijection(value), *self.bijection.inverse(self.bijection(value)[0])

    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(Both(), (points("real"),), strict=False, dynamic_shapes={"value": {0: batch}})
    value = points("real", BATCH + 3)
    for ours, theirs in zip(Both()(value), exported.module()(value), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# -- univariate maps ---------------------------------------------------------------------------------------------------

UNIVARIATE = {
    "affine": Affine,
    "contraction": Contraction,
    "spline": spline,
    "spline-linear-tails": lambda: spline(tails="linear"),
    "spline-two-bins": lambda: RationalQuadraticSpline(2),
    "spline-off-center": lambda: RationalQuadraticSpline(7, -1.0, 4.0),
    "spline-unit": lambda: spline(0, 1, "linear"),
    "logistic-mixture": lambda: LogisticMixture(3),
}


@pytest.mark.parametrize("make", UNIVARIATE.values(), ids=UNIVARIATE)
def test_zero_parameters_are_the_identity(make):
    univariate = make()
    x = torch.linspace(-6, 6, 50).unsqueeze(-1)
    for map in (univariate, univariate.inverse):
        value, log_slope = map(x, torch.zeros(univariate.num_parameters, 1))
        torch.testing.assert_close(value, x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", UNIVARIATE.values(), ids=UNIVARIATE)
def test_free_parameters_are_those_of_every_row(make):
    """(P, D) and (N, P, D) say the same."""
    univariate = make()
    raw, x = torch.randn(univariate.num_parameters, 3), torch.randn(7, 3)
    for map in (univariate, univariate.inverse):
        for one, all_rows in zip(map(x, raw), map(x, raw.expand(7, -1, -1)), strict=True):
            torch.testing.assert_close(one, all_rows, rtol=1e-12, atol=1e-12)


@given(st.integers(2, 12), st.floats(0.1, 6), st.sampled_from(["identity", "linear"]), st.integers(0, 2**31))
@settings(max_examples=60)
def test_splines_are_increasing_and_invertible_whatever_the_network_says(bins, scale, tails, seed):
    generator = torch.Generator().manual_seed(seed)
    univariate = RationalQuadraticSpline(bins, -2.0, 1.5, tails)
    raw = scale * torch.randn(univariate.num_parameters, 1, generator=generator)
    x = torch.linspace(-3, 3, 401).unsqueeze(-1)
    z, log_slope = univariate.inverse(x, raw)
    assert (z.diff(dim=0) > 0).all()
    back, log_slope_back = univariate(z, raw)
    # slopes reach down to 1e-3 squared between the knots, and as far does an error in z grow on the way back
    torch.testing.assert_close(back, x, rtol=0, atol=1e-7)
    torch.testing.assert_close(log_slope_back, -log_slope, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tails", ["identity", "linear"])
@pytest.mark.parametrize("end", [-5.0, 5.0])
@pytest.mark.parametrize(("near", "bound"), [(1e-5, 1e-5), (0.1, 5e-3)])
def test_single_precision_is_as_good_at_either_end_of_the_box(tails, end, near, bound):
    """Against double precision, with bins that are narrow and slopes that differ from bin to bin."""
    univariate = RationalQuadraticSpline(8, tails=tails)
    raw = (3 * torch.randn(20_000, univariate.num_parameters, 1)).float()
    x = (end + near * (2 * torch.rand(20_000, 1) - 1)).float()
    for map in (univariate.inverse, univariate.forward):
        (_, log_slope), (_, exact) = map(x, raw), map(x.double(), raw.double())
        torch.testing.assert_close(log_slope.double(), exact, rtol=0, atol=bound)


def test_a_spline_seen_from_the_other_end_is_its_mirror_image():
    univariate = RationalQuadraticSpline(6, -2.0, 2.0, "linear")
    raw, x = 2 * torch.randn(univariate.num_parameters, 1), 3 * torch.randn(200, 1)
    mirrored = torch.cat([part.flip(0) for part in raw.split((6, 6, 7))])
    for map in (univariate.inverse, univariate.forward):
        (z, log_slope), (other, other_log_slope) = map(x, raw), map(-x, mirrored)
        torch.testing.assert_close(other, -z)
        torch.testing.assert_close(other_log_slope, log_slope)


def knots_of(univariate, raw):
    """Positions and derivatives at the knots, computed feature by feature from Durkan et al.'s description."""
    bins, smallest = univariate.bins, univariate.SMALLEST
    axes = []
    for part in (raw[:bins], raw[bins : 2 * bins]):
        sizes = [smallest + (1 - bins * smallest) * float(s) for s in torch.softmax(part, 0)]
        axes.append([univariate.low + univariate.size * sum(sizes[:k]) for k in range(bins + 1)])
    offset = math.log(math.expm1(1 - smallest))
    inner = [smallest + math.log1p(math.exp(float(d) + offset)) for d in raw[2 * bins :]]
    return axes[0], axes[1], inner if univariate.tails == "linear" else [1.0, *inner, 1.0]


@pytest.mark.parametrize("tails", ["identity", "linear"])
def test_splines_follow_the_published_formula(tails):
    univariate = RationalQuadraticSpline(6, -2.0, 3.0, tails)
    raw = 1.5 * torch.randn(univariate.num_parameters)
    xs, zs, ds = knots_of(univariate, raw)
    value, log_slope = univariate.inverse(torch.linspace(-4, 5, 300).unsqueeze(-1), raw.unsqueeze(-1))
    for x, z, log_dz in zip(torch.linspace(-4, 5, 300).tolist(), value.tolist(), log_slope.tolist(), strict=True):
        if x < xs[0]:
            expected, slope = zs[0] + ds[0] * (x - xs[0]), ds[0]
        elif x >= xs[-1]:
            expected, slope = zs[-1] + ds[-1] * (x - xs[-1]), ds[-1]
        else:
            k = max(k for k in range(6) if xs[k] <= x)
            w, h = xs[k + 1] - xs[k], zs[k + 1] - zs[k]
            s, t = h / w, (x - xs[k]) / w
            below = s + (ds[k + 1] + ds[k] - 2 * s) * t * (1 - t)
            expected = zs[k] + h * (s * t**2 + ds[k] * t * (1 - t)) / below
            slope = s**2 * (ds[k + 1] * t**2 + 2 * s * t * (1 - t) + ds[k] * (1 - t) ** 2) / below**2
        assert z[0] == pytest.approx(expected, abs=1e-9)
        assert log_dz[0] == pytest.approx(math.log(slope), abs=1e-9)


@pytest.mark.parametrize("tails", ["identity", "linear"])
def test_value_and_derivative_are_continuous_at_the_knots(tails):
    univariate = RationalQuadraticSpline(5, -2.0, 2.0, tails)
    raw = torch.randn(univariate.num_parameters, 1)
    xs, zs, ds = knots_of(univariate, raw[:, 0])
    for map, knots, images, sign in ((univariate.inverse, xs, zs, 1), (univariate, zs, xs, -1)):
        for step in (-1e-11, 0.0, 1e-11):
            value, log_slope = map(torch.tensor(knots).unsqueeze(-1) + step, raw)
            torch.testing.assert_close(value, torch.tensor(images).unsqueeze(-1), rtol=0, atol=1e-8)
            torch.testing.assert_close(log_slope, sign * torch.tensor(ds).log().unsqueeze(-1), rtol=0, atol=1e-6)


def test_identity_tails_leave_alone_what_is_outside():
    univariate = RationalQuadraticSpline(5, -2.0, 2.0)
    x = torch.tensor([-1e6, -30.0, -2.1, -2.0, 2.0, 2.1, 30.0, 1e6]).unsqueeze(-1)
    for map in (univariate, univariate.inverse):
        value, log_slope = map(x, 3 * torch.randn(univariate.num_parameters, 1))
        torch.testing.assert_close(value, x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=1e-12)


def test_a_spline_on_the_unit_interval_keeps_its_ends():
    univariate = RationalQuadraticSpline(5, 0, 1, "linear")
    assert univariate.unit
    for map in (univariate, univariate.inverse):
        value, _ = map(torch.tensor([[0.0], [1.0]]), 3 * torch.randn(univariate.num_parameters, 1))
        torch.testing.assert_close(value, torch.tensor([[0.0], [1.0]]), rtol=0, atol=1e-12)


def test_splines_hold_in_single_precision():
    """Against float64 on the same numbers, bins and derivatives being as extreme as networks can make them."""
    univariate = RationalQuadraticSpline(8, -5.0, 5.0)
    raw = 6 * torch.randn(5000, univariate.num_parameters, 3)
    x = 12 * torch.rand(5000, 3) - 6
    for map in (univariate.inverse, univariate):
        exact, log_slope = map(x, raw)
        rough, rough_log_slope = map(x.float(), raw.float())
        assert rough.dtype == torch.float32
        assert torch.isfinite(rough_log_slope).all()
        # ten rounding errors of the box, in the value and, times the slope, in the argument
        assert ((rough - exact).abs() <= 100 * torch.finfo(torch.float32).eps * (1 + log_slope.exp())).all()
    back, _ = univariate.inverse(rough, raw.float())
    slope = univariate.inverse(exact, raw)[1].exp()
    assert ((back - x).abs() <= 100 * torch.finfo(torch.float32).eps * (1 + slope)).all()


def test_gradients_of_splines_are_finite_at_knots_and_beyond_the_box():
    univariate = RationalQuadraticSpline(4, -1.0, 1.0)
    for dtype in (torch.float32, torch.float64):
        raw = torch.zeros(univariate.num_parameters, 1, dtype=dtype, requires_grad=True)
        x = torch.tensor([-50.0, -1.0, -0.5, 0.0, 0.5, 1.0, 50.0], dtype=dtype).unsqueeze(-1).requires_grad_()
        for map in (univariate, univariate.inverse):
            value, log_slope = map(x, raw)
            for gradient in torch.autograd.grad(value.sum() + log_slope.sum(), (raw, x)):
                assert torch.isfinite(gradient).all()


def test_affine_log_scales_are_bounded():
    univariate = Affine(bound=2.0)
    raw = torch.tensor([[0.0], [1e8]])
    x, log_slope = univariate(torch.ones(1, 1), raw)
    torch.testing.assert_close(log_slope, torch.full((1, 1), 2.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(x, torch.full((1, 1), math.exp(2.0)), rtol=1e-6, atol=0)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_a_contraction_maps_its_box_into_itself(raw_shift, raw_scale):
    raw = torch.tensor([[raw_shift], [raw_scale]])
    ends, log_slope = Contraction()(torch.tensor([[-4.0], [4.0]]), raw)
    assert ends[0] >= -4
    assert ends[1] <= 4
    assert ((log_slope <= 0) & (log_slope > math.log(1 - 2.5 / 4) - 1.5)).all()


# -- who depends on whom -----------------------------------------------------------------------------------------------


@st.composite
def masks(draw):
    return tuple(draw(st.permutations([True, False, *draw(st.lists(st.booleans(), max_size=6))])))


@given(masks(), st.integers(0, 2**31))
@settings(max_examples=30)
def test_a_coupling_moves_only_what_does_not_pass_and_only_by_what_does(mask, seed):
    torch.manual_seed(seed)
    size, passing = len(mask), sum(mask)
    layer = Coupling(mask, Affine(), MLP((passing,), 2 * (size - passing), (8,)))
    z = torch.randn(3, size)
    x, _ = layer(z)
    keep = torch.tensor(mask)
    assert torch.equal(x[:, keep], z[:, keep])
    assert (x[:, ~keep] != z[:, ~keep]).all()
    torch.testing.assert_close(layer.inverse(x)[0], z, rtol=1e-9, atol=1e-9)
    moved = jacobians(layer, z, None)[0][~keep][:, ~keep]
    assert torch.equal(moved, torch.diag(moved.diagonal()))


@given(st.permutations(range(5)), st.integers(0, 2**31))
@settings(max_examples=20)
def test_autoregressive_maps_are_triangular_in_their_order(order, seed):
    torch.manual_seed(seed)
    layer = MaskedAutoregressive(Affine(), MADE(5, 2, (16,), order=tuple(order), activation="tanh"))
    matrix = jacobians(layer.inverse, torch.randn(1, 5), None)[0][order][:, order]
    assert torch.equal(matrix, matrix.tril())
    assert (matrix.diagonal() > 0).all()
    assert (matrix.tril(-1) != 0).sum() == 10


def test_a_permutation_reads_its_order():
    assert Permutation((2, 0, 1))(torch.tensor([[10.0, 11.0, 12.0]]))[0].tolist() == [[12.0, 10.0, 11.0]]


def test_lu_is_the_linear_map_of_its_factors():
    layer = LULinear(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, 2.0, 3.0], [4.0, 0.2, 5.0], [6.0, 7.0, 0.3]]))
        layer.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    lower = torch.tensor([[1.0, 0, 0], [4, 1, 0], [6, 7, 1]])
    upper = torch.tensor([[math.exp(0.1), 2, 3], [0, math.exp(0.2), 5], [0, 0, math.exp(0.3)]])
    x = torch.randn(4, 3)
    z, log_det = layer.inverse(x)
    torch.testing.assert_close(z, x @ (lower @ upper).T + layer.bias)
    torch.testing.assert_close(log_det, torch.full((4,), 0.6))


# -- the ends of flows on a cube ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [Sigmoid(), NormalCDF()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges_and_tails_stay_finite_and_inside(end, dtype):
    edges = torch.tensor([[0.0, 1.0, 5e-324, 1e-38, 0.5]], dtype=dtype).requires_grad_()
    z, log_det = end.inverse(edges)
    assert torch.isfinite(z).all()
    assert torch.isfinite(log_det).all()
    assert (z.abs() < 40).all()
    (gradient,) = torch.autograd.grad(z.sum() + log_det.sum(), edges)
    assert torch.isfinite(gradient).all()
    x, log_det = end(torch.tensor([[-1e3, -50.0, 0.0, 50.0, 1e3]], dtype=dtype))
    assert ((x > 0) & (x < 1)).all()
    assert torch.isfinite(log_det).all()


def test_the_normal_cdf_makes_a_normal_uniform():
    x = torch.rand(200, 1)
    z, log_det = NormalCDF().inverse(x)
    torch.testing.assert_close(torch.distributions.Normal(0.0, 1.0).log_prob(z[:, 0]) + log_det, torch.zeros(200))


# -- activation normalization ------------------------------------------------------------------------------------------


def far(size=500):
    return torch.randn(size, D) * torch.tensor([0.1, 1.0, 5.0, 20.0]) + torch.tensor([-3.0, 0.0, 7.0, 100.0])


def test_actnorm_starts_from_its_first_training_batch_and_only_from_that():
    layer, x = ActNorm(D), far()
    z, log_det = layer.inverse(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(D), rtol=0, atol=1e-9)
    torch.testing.assert_close(z.std(0), torch.ones(D))
    torch.testing.assert_close(log_det, -x.std(0).log().sum().expand(len(x)))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.inverse(10 * far())
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_actnorm_is_the_identity_until_then():
    layer, x = ActNorm(D), far()
    with torch.no_grad():
        assert torch.equal(layer.inverse(x)[0], x)
    layer.eval()
    assert torch.equal(layer.inverse(x)[0], x)
    layer.train()
    assert torch.equal(layer(x)[0], x)
    assert torch.equal(layer.inverse(x[:1])[0], x[:1])  # one x has no spread
    assert not layer.initialized


def test_actnorm_trains_on_from_where_it_started():
    layer = ActNorm(D)
    layer.inverse(far())[0].square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_actnorm_keeps_its_state_in_checkpoints():
    trained, fresh, x = ActNorm(D), ActNorm(D), far()
    trained.inverse(x)
    fresh.load_state_dict(trained.state_dict())
    assert fresh.initialized
    assert torch.equal(fresh.inverse(10 * x)[0], trained.inverse(10 * x)[0])
    fresh.load_state_dict(ActNorm(D).state_dict())
    fresh.inverse(10 * x)
    torch.testing.assert_close(fresh.location.detach(), 10 * x.mean(0))


def test_actnorm_survives_a_constant_feature():
    z, log_det = ActNorm(1).inverse(torch.ones(5, 1))
    assert torch.equal(z, torch.zeros(5, 1))
    assert torch.equal(log_det, torch.zeros(5))  # what does not vary has no scale to divide by


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, D), "x has a single datum, which has no scale"),
        (torch.zeros(3, D + 1), r"x has shape \(3, 5\)"),
        (torch.full((3, D), math.nan), "x holds NaN"),
    ],
)
def test_actnorm_refuses_what_it_cannot_start_from_and_stays_as_it_was(x, message):
    layer = ActNorm(D)
    with pytest.raises(ValueError, match=message):
        layer.initialize(x)
    assert not layer.initialized
    assert not any(parameter.any() for parameter in layer.parameters())


def test_actnorm_is_not_started_by_export():
    layer = ActNorm(D)

    class Inverting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer.inverse(x)

    exported = torch.export.export(Inverting(), (far(),), strict=False).module()
    assert not layer.initialized
    x = far()
    layer.initialize(x)  # the exported module shares the parameters
    torch.testing.assert_close(exported(x)[0].std(0), torch.ones(D))


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD = {
    "contraction-shift": (lambda: Contraction(largest_shift=4.0), ValueError, "largest_shift must be less than radius"),
    "affine-bound": (lambda: Affine(0.0), ValueError, "bound must be a number above 0"),
    "spline-one-bin": (lambda: RationalQuadraticSpline(1), ValueError, "bins must be an int from 2"),
    "spline-bins-type": (lambda: RationalQuadraticSpline(4.0), ValueError, r"bins must be an int.*4\.0"),
    "spline-box": (lambda: RationalQuadraticSpline(4, 2.0, 2.0), ValueError, "low must be less than high"),
    "spline-tails": (
        lambda: RationalQuadraticSpline(4, tails="flat"),
        ValueError,
        "tails must be one of identity, linear",
    ),
    "coupling-nothing-passes": (
        lambda: Coupling((False, False), Affine(), nn.Linear(1, 2)),
        ValueError,
        "some True and some False",
    ),
    "coupling-all-pass": (lambda: Coupling((True, True), Affine(), nn.Linear(1, 2)), ValueError, "some True and some"),
    "coupling-integers": (lambda: Coupling((1, 0), Affine(), nn.Linear(1, 2)), ValueError, "sequence of booleans"),
    "coupling-network-size": (
        lambda: Coupling((True, False), Affine(), nn.Linear(1, 3))(torch.zeros(5, 2)),
        ValueError,
        r"returned shape \(5, 3\).*Affine on 1 features needs \(5, 2, 1\) or \(5, 2\)",
    ),
    "maf-no-order": (
        lambda: MaskedAutoregressive(Affine(), nn.Linear(2, 4)),
        ValueError,
        "Linear must have in_shape",
    ),
    "maf-parameters": (
        lambda: MaskedAutoregressive(spline(), MADE(3, 2)).inverse(torch.zeros(5, 3)),
        ValueError,
        r"returned shape \(5, 2, 3\).*needs \(5, 14, 3\)",
    ),
    "elementwise-network": (lambda: Elementwise(2, Affine(), nn.Linear(3, 4)), ValueError, "must have in_shape"),
    "permutation-twice": (lambda: Permutation((0, 0)), ValueError, "each index 0 .. D - 1 once"),
    "permutation-reals": (lambda: Permutation((0.0, 1.0)), ValueError, "each index 0 .. D - 1 once"),
}


@pytest.mark.parametrize(("act", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_by_name(act, error, message):
    with pytest.raises(error, match=message):
        act()
