"""Autoregressive models in any order: on networks that are exact, every order and every part is exact."""

import itertools

import pytest
import torch
from programs import CASES, any_order, rows
from pyro import poutine
from torch import nn
from torch.distributions import MultivariateNormal

import dgm_pyro as dgm
from dgm_pyro.families.missing import observed_part
from dgm_pyro.program import batch_plates, log_prob_sum

BITS = torch.tensor(list(itertools.product(range(2), repeat=4)))
MEAN, COV = torch.tensor([0.5, -1.0, 0.2]), torch.tensor([[1.0, 0.8, 0.3], [0.8, 2.0, -0.4], [0.3, -0.4, 0.7]])


class TableConditionals(nn.Module):
    """The logits of all p(x_i = 1 | x_S) of a joint mass of bits, by summing it."""

    def __init__(self, mass):
        super().__init__()
        self.in_shape = self.given_shape = (4,)
        self.register_buffer("mass", mass)

    def forward(self, x, seen):
        agrees = ((x.unsqueeze(1) == BITS) | (seen == 0).unsqueeze(1)).all(-1)  # (B, 16)
        mass = agrees * self.mass
        return (mass @ BITS.to(mass) / mass.sum(1, keepdim=True)).logit()


class NormalConditionals(nn.Module):
    """The raw parameters of all p(x_i | x_S) of N(MEAN, COV)."""

    def __init__(self):
        super().__init__()
        self.in_shape = self.given_shape = (3,)

    def forward(self, x, seen):
        both = seen.unsqueeze(1) * seen.unsqueeze(2)
        among = torch.where(both == 1, COV.to(x), torch.eye(3).to(x))
        gain = torch.linalg.solve(among, COV.to(x) * seen.unsqueeze(2)).mT  # of each feature, (B, 3, 3)
        mean = MEAN.to(x) + (gain @ (seen * (x - MEAN)).unsqueeze(-1)).squeeze(-1)
        # Nothing reads the conditional of a feature that is seen.
        variance = torch.where(seen == 1, 1.0, COV.diagonal() - (gain * COV * seen.unsqueeze(1)).sum(-1))
        return torch.stack([mean, variance.sqrt().expm1().log()], 1)


def known_bits():
    torch.manual_seed(3)
    mass = (2 * torch.randn(16)).softmax(0)
    return dgm.AnyOrder(dgm.Bernoulli(4, TableConditionals(mass))), mass


def marginal_of(mass, mask):
    """log p of the observed bits of each of BITS."""
    agrees = ((BITS.unsqueeze(0) == BITS.unsqueeze(1)) | ~mask).all(-1)
    return (agrees * mass).sum(-1).log()


def normal_marginals(x, mask):
    each = [MultivariateNormal(MEAN[m], COV[m][:, m]).log_prob(row[m]) for row, m in zip(x, mask, strict=True)]
    return torch.stack(each)


def keys_of(order):
    return torch.tensor(order).argsort() / len(order)


# -- exact conditionals ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("observed", [*itertools.product([True, False], repeat=4)][:-1])
def test_with_exact_conditionals_the_bound_is_the_evidence_of_every_part(observed):
    program, mass = known_bits()
    mask = torch.tensor(observed).expand(16, 4)
    evidence = dgm.evaluate(program, dgm.Data(BITS, levels=2, mask=mask), num_particles=2)
    torch.testing.assert_close(evidence.values, marginal_of(mass, mask[0]))


@pytest.mark.usefixtures("float64")
def test_every_order_is_exact():
    program, mass = known_bits()
    for order in itertools.permutations(range(4)):
        torch.testing.assert_close(program.in_order(order).log_prob(BITS), mass.log())


@pytest.mark.usefixtures("float64")
def test_the_observed_part_is_in_the_units_of_x():
    program = dgm.AnyOrder(dgm.Normal(3, NormalConditionals()))
    shift, scale = torch.tensor([10.0, -20.0, 0.0]), torch.tensor([1.0, 5.0, 0.2])
    mask = torch.tensor([[True, True, True], [True, False, True], [False, False, True], [False, True, False]])
    u = torch.randn(4, 3)
    data = dgm.Data((shift + scale * u).masked_fill(~mask, torch.nan), mask=mask)
    evidence = dgm.evaluate(dgm.Standardized(program, shift, scale), data, num_particles=2)
    torch.testing.assert_close(evidence.values, normal_marginals(u, mask) - torch.where(mask, scale.log(), 0.0).sum(1))


def test_imputations_are_draws_given_what_is_observed():
    program, mass = known_bits()
    mask = torch.tensor([False, True, False, True])
    x = torch.tensor([[0, 1, 0, 0]])
    agrees = ((x == BITS) | ~mask).all(1)
    exact = agrees * mass / mass[agrees].sum()
    number = 4000
    drawn = dgm.infer.impute(program, x, mask, num_samples=number)[:, 0]
    found = (drawn.unsqueeze(1) == BITS).all(-1).double().mean(0)
    error = (exact * (1 - exact) / number).sqrt() + 1e-9
    assert ((found - exact).abs() < 4.5 * error).all()


@pytest.mark.usefixtures("float64")
def test_imputations_in_one_order_are_weighted_by_what_comes_later():
    """The exact posterior of a completion is proportional to its p(x | order), which differs between orders here."""
    program = CASES["any-order"].build().in_order((2, 0, 1))
    x, mask = torch.tensor([[0, 1, 0]]), torch.tensor([False, True, False])
    every = BITS[:8, 1:]
    mass = program.log_prob(every).exp() * ((x == every) | ~mask).all(1)
    exact, number = (mass / mass.sum()).detach(), 4000
    drawn = dgm.infer.impute(program, x, mask, num_samples=number, num_particles=40_000)[:, 0]
    found = (drawn.unsqueeze(1) == every).all(-1).double().mean(0)
    assert ((found - exact).abs() < 4.5 * (exact * (1 - exact) / number).sqrt() + 1e-9).all()


# -- any network -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("observed", [(True, True, True), (True, False, True), (False, True, False)])
def test_the_plated_bound_is_the_mean_of_the_orders(observed):
    """Over all orders, and over places between which the estimate does not change."""
    program = CASES["any-order"].build()
    x = BITS[:8, 1:]
    part, unrolled = (observed_part(form, data_of(x, observed)) for form in (program, program.unroll()))
    value = part.arguments(data_of(x, observed))[0]
    places = (torch.arange(6) + 0.5) / 6  # each of the 1, 2 or 3 observed features equally often
    plated, exact = [], []
    for order in itertools.permutations(range(3)):
        keys = keys_of(order).expand(8, 3)
        exact.append(stated(unrolled, value, {"x_order": keys}))
        plated += [stated(part, value, {"x_order": keys, "x_place": place.expand(8)}) for place in places]
    torch.testing.assert_close(torch.stack(plated).mean(0), torch.stack(exact).mean(0))
    differ = torch.stack(exact).std(0).max() > 1e-3
    assert differ == (sum(observed) > 1)


def data_of(x, observed):
    return dgm.Data(x, levels=2, mask=torch.tensor(observed).expand(len(x), 3))


def stated(program, value, latents):
    """log p(x | latents) of each row; the latents have density 1."""
    with poutine.trace() as traced, poutine.condition(data=latents), batch_plates((len(value),)):
        program.joint("x", value)
    return log_prob_sum(traced.trace, (len(value),))


@pytest.mark.usefixtures("float64")
def test_the_mass_of_an_observed_part_sums_to_one_in_every_order():
    program = CASES["any-order"].build().unroll()
    parts = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]])
    data = data_of(parts, (True, False, True))
    part = observed_part(program, data)
    for order in itertools.permutations(range(3)):
        log_p = stated(part, part.arguments(data)[0], {"x_order": keys_of(order).expand(4, 3)})
        torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0))


@pytest.mark.usefixtures("float64")
def test_an_order_is_the_chain_rule_by_hand():
    program, x = CASES["any-order-given-label"].build(), torch.tensor([[[2], [1]]]).unsqueeze(1)
    y, chain = torch.tensor([1]), 0.0
    for feature, seen in ((1, (False, False)), (0, (False, True))):
        raw = program.raw_parameters(x, torch.tensor(seen).reshape(1, 1, 2, 1), y).reshape(2, 3)
        chain = chain + raw[feature].log_softmax(-1)[x.flatten()[feature]]
    torch.testing.assert_close(program.in_order((1, 0)).log_prob(x, y), chain.reshape(1))


@pytest.mark.parametrize("name", ["any-order", "columns-any-order", "standardized-any-order"])
def test_what_is_missing_is_never_read(name):
    case, found = CASES[name], []
    x, _ = case.draw(case.build(), 40)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) > 0.4
    for other in (x, x.flip(0)):
        program = case.build()
        values = torch.where(mask, x, other)
        data = dgm.Data(values, levels=program.levels, mask=mask)
        dgm.fit(program, data, epochs=2, validation=None, progress=False)
        drawn = dgm.infer.impute(program, values, mask, num_samples=2)
        found.append(torch.cat([p.detach().flatten() for p in program.parameters()] + [drawn.flatten().float()]))
    assert torch.equal(*found)


# -- training ----------------------------------------------------------------------------------------------------------


def test_training_on_incomplete_rows_finds_the_joint():
    """A linear network has the conditionals of two Normals: a gain and a variance for each mask."""
    torch.manual_seed(0)
    joint = MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    x, mask = joint.sample((4000,)), torch.rand(4000, 2) > 0.3
    program = dgm.AnyOrder(dgm.Normal(2, dgm.networks.ObservedInput(2, nn.Linear(4, 4))))
    dgm.fit(program, dgm.Data(x, mask=mask), epochs=30, batch_size=500, lr=0.05, validation=None, progress=False)
    test = joint.sample((1000,))
    exact = joint.log_prob(test).mean()
    # 12 numbers learned from 4000 rows cost about 12 / 8000 nats; and the last steps of Adam a few times that.
    for order in ((0, 1), (1, 0)):
        assert abs(program.in_order(order).log_prob(test).mean() - exact) < 0.02
    seen = torch.rand(1000, 2) > 0.3
    marginal = torch.distributions.Normal(0, 1).log_prob(test)
    part = torch.where(seen.all(1), joint.log_prob(test), torch.where(seen, marginal, 0.0).sum(1)).mean().item()
    assert abs(dgm.evaluate(program, dgm.Data(test, mask=seen), num_particles=2).nats - part) < 0.02


@pytest.mark.parametrize("kinds", [None, {"a": "real", "b": "positive", "c": "count", "d": ("bounded", -1, 3),
                                          "e": ("category", 3)}])  # fmt: skip
def test_by_name_it_trains_on_what_was_observed_in_its_units(kinds):
    torch.manual_seed(0)
    x, mask = rows(300), torch.rand(300, 5) > 0.3
    data = dgm.Data(x.masked_fill(~mask, torch.nan), mask=mask)
    program = dgm.build("any-order", data, columns=kinds)
    before = dgm.evaluate(program, data).nats
    dgm.fit(program, data, epochs=5, lr=0.003, progress=False)
    assert dgm.evaluate(program, data).nats > before
    completed = dgm.infer.impute(program, data.x[:8], mask[:8], num_samples=3)
    assert torch.equal(completed[:, mask[:8]], data.x[:8][mask[:8]].expand(3, -1))
    program.check(completed.flatten(0, 1), support=True)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dgm.AnyOrder(dgm.Bernoulli(3)), ValueError, "factors has no network.*ObservedInput"),
        (lambda: dgm.AnyOrder(dgm.Bernoulli(3, nn.Linear(3, 3))), ValueError, "reads no mask.*ObservedInput"),
        (
            lambda: dgm.AnyOrder(dgm.Bernoulli(2, dgm.networks.ObservedInput(3, nn.Linear(6, 2)))),
            ValueError,
            r"\(3,\) and \(3,\), but the event_shape of this Bernoulli is \(2,\)",
        ),
        (lambda: any_order(dgm.Bernoulli, 3).in_order((0, 0, 1)), ValueError, "order must name each of the 3 features"),
        (
            lambda: dgm.networks.ObservedInput(3, nn.Linear(3, 3)),
            ValueError,
            r"inputs of shape \(3,\), .* make 6",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
