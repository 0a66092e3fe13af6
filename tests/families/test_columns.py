"""Columns of mixed kinds: each column's own distribution, exactly, and models that know what depends on what."""

import math

import pytest
import torch
from programs import CASES, rows, table
from scipy import stats

import dgm_pyro as dgm
from dgm_pyro.families.conditionals import inverse_softplus
from dgm_pyro.networks import ColumnReader


@pytest.mark.usefixtures("float64")
def test_the_density_is_the_product_of_those_of_the_columns():
    raw = torch.zeros(9, 5)
    raw[3:6, 0], raw[6:, 0] = torch.tensor([-1.0, 0.0, 2.0]), inverse_softplus(1.0)
    raw[:2, 1] = torch.tensor([0.3, inverse_softplus(0.8)])
    raw[:2, 2] = torch.tensor([math.log(2.5), inverse_softplus(1.5)])
    raw[:2, 3] = torch.tensor([math.log(3.0), inverse_softplus(4.0)])
    raw[:3, 4] = torch.tensor([0.1, 0.2, 0.7]).log()
    program = dgm.Columns(
        {"a": "real", "b": "positive", "c": "count", "d": ("bounded", -1.0, 3.0), "e": ("category", 3)},
        shift=[0.5, 9.0, 9.0, 9.0, 9.0],
        scale=[2.0, 0.5, 9.0, 9.0, 9.0],
        parameters=raw,
    )
    x = torch.tensor([[1.1, 0.4, 4.0, 2.5, 2.0], [-3.0, 7.0, 0.0, -0.9, 0.0]])
    a, b, c, d = x[:, :4].numpy().T
    real = sum(stats.norm.pdf(a, 0.5 + 2 * loc, 2) for loc in (-1, 0, 2)) / 3
    expected = stats.lognorm.logpdf(b, 0.8, scale=0.5 * math.exp(0.3)) + stats.nbinom.logpmf(c, 1.5, 1.5 / 4.0)
    expected += stats.beta.logpdf(d, 3, 1, loc=-1, scale=4) + torch.tensor([0.7, 0.1]).log().numpy()
    torch.testing.assert_close(program.log_prob(x), torch.from_numpy(expected) + torch.from_numpy(real).log())


@pytest.mark.usefixtures("float64")
def test_amounts_start_where_the_data_are():
    """A count around 750 and a positive column of 13 +- 0.4 are many steps from a mean of 1 and a median of 0.4."""
    kinds, units = {"proline": "count", "alcohol": "positive"}, {"shift": [750.0, 13.0], "scale": [200.0, 0.4]}
    network = torch.nn.Linear(1, 4)
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.tensor([[700.0, 12.0]])
    expected = stats.nbinom.logpmf(700, 1, 1 / 751) + stats.lognorm.logpdf(12, 1, scale=13)
    assert dgm.Columns(kinds, **units).log_prob(x).item() == pytest.approx(expected)
    given = dgm.Columns(kinds, network, **units)
    assert given.log_prob(x, torch.ones(1, 1)).item() == pytest.approx(expected)


def test_draws_are_of_each_columns_kind():
    torch.manual_seed(0)
    program = dgm.Columns(
        {"age": ("integer", 18, 99), "grade": ("ordinal", 5), "share": ("bounded", 10.0, 20.0), "n": dgm.Poisson(())}
    )
    x = program.sample(500)
    assert torch.equal(x[:, [0, 1, 3]], x[:, [0, 1, 3]].round())
    assert x[:, 0].min() >= 18
    assert x[:, 0].max() <= 99
    assert x[:, 1].unique().tolist() == [0, 1, 2, 3, 4]
    assert x[:, 2].min() > 10
    assert x[:, 2].max() < 20
    assert abs(x[:, 3].mean() - 1) < 4.5 / 500**0.5


def test_evidence_says_which_columns_are_a_mass():
    torch.manual_seed(0)
    x = rows(30)
    mixed, reals = dgm.evaluate(table(), x), dgm.evaluate(dgm.Normal(5), x)
    assert mixed.measure == "mass of features 2, 4, density of the others"
    with pytest.raises(
        ValueError, match="a mass of features 2, 4, density of the others cannot be compared with a density"
    ):
        mixed.minus(reals)
    every = dgm.Columns({"a": ("category", 3), "b": "count"})
    assert every.measure == "mass"
    assert dgm.Columns({"a": "real", "b": "positive"}).measure == "density"


def test_a_value_that_its_column_cannot_have_is_named():
    x = rows(8)
    x[5, 4] = 3.0
    with pytest.raises(
        ValueError, match=r"x holds 3 in row 5, outside of the support of this Columns, IntegerInterval"
    ):
        dgm.fit(table(learned=True), x, epochs=1, progress=False)


def test_a_reader_shows_categories_one_hot_and_amounts_in_logarithms():
    reader = ColumnReader([None, 3, None], [2], shift=[1.0, 0.0, 0.0], scale=[2.0, 1.0, 1.0])
    inputs = reader(torch.tensor([[5.0, 1.0, math.e - 1]]))
    torch.testing.assert_close(inputs, torch.tensor([[2.0, 0.0, 1.0, 0.0, 1.0]]))
    assert (reader.out_features, reader.widths) == (5, [1, 3, 1])


def related(size):
    """A category, an amount that depends on it, and a count that depends on the amount: their log p is known."""
    kind = torch.randint(3, (size,))
    amount = torch.exp(kind.float() + 0.3 * torch.randn(size))
    count = torch.poisson(2 * amount)
    log_p = torch.distributions.LogNormal(kind.float(), 0.3).log_prob(amount)
    log_p = log_p + torch.distributions.Poisson(2 * amount).log_prob(count) - math.log(3)
    return torch.stack([kind.float(), 1000 * amount, count], -1), log_p - math.log(1000)


KINDS = {"kind": ("category", 3), "amount": "positive", "count": "count"}


def test_a_chain_over_the_columns_learns_what_independent_columns_cannot(tmp_path):
    torch.manual_seed(0)
    (x, _), (unseen, log_p) = related(2000), related(1000)
    data, found = dgm.Data(x), {}
    for name, epochs in (("pixels", 20), ("made", 12)):
        program = dgm.build(name, data, columns=KINDS)
        dgm.fit(program, data, epochs=epochs, lr=0.003, batch_size=100, progress=False)
        found[name] = dgm.evaluate(program, unseen).nats
    assert found["made"] == pytest.approx(log_p.mean().item(), abs=0.1)
    assert found["pixels"] < found["made"] - 1
    dgm.save(program, tmp_path)
    torch.testing.assert_close(dgm.load(tmp_path).log_prob(unseen), program.log_prob(unseen))


def test_a_vae_of_columns_reads_them_in_its_own_way():
    torch.manual_seed(0)
    x, _ = related(600)
    data = dgm.Data(x)
    program = dgm.build("vae", data, columns=KINDS, hidden=(32,))
    before = dgm.evaluate(program, data).nats
    dgm.fit(program, data, epochs=8, lr=0.01, progress=False)
    assert dgm.evaluate(program, data).nats > before + 1
    assert program.encoder.network.out_features == 5
    assert program.sample(50)[:, 0].max() <= 2


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"a": "text"}, r"columns\['a'\] must be one of 'real', .*got 'text'"),
        ({"a": ("category", 1)}, r"columns\['a'\] must be an int of at least 2, got 1"),
        ({"a": ("bounded", 1.0, 1.0)}, r"columns\['a'\] must be a number above 1.0, got 1.0"),
        ({"a": dgm.Normal(2)}, r"columns\['a'\] must be a conditional of event_shape \(\)"),
        ({}, "columns is empty"),
    ],
)
def test_a_kind_that_there_is_not(kinds, message):
    with pytest.raises(ValueError, match=message):
        dgm.Columns(kinds)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nsf", {}, "for the models pixels, made, any-order, vae, not for 'nsf'"),
        ("vae", {"likelihood": "beta"}, "columns is a likelihood too"),
        ("made", {"columns": {"a": "real"}}, "columns has 1 kinds, but data is"),
    ],
)
def test_what_columns_do_not_go_with(name, options, message):
    data = dgm.Data(related(20)[0])
    with pytest.raises(ValueError, match=message):
        dgm.build(name, data, **{"columns": KINDS, **options})


def test_missing_columns_are_drawn_given_those_before_them():
    program = CASES["columns-made"].build()
    x = rows(6)
    drawn = dgm.infer.impute(program, x, torch.tensor([True, False, True, False, True]), num_samples=3)
    assert torch.equal(drawn[..., [0, 2, 4]], x[:, [0, 2, 4]].expand(3, -1, -1))
    assert (drawn[..., 1] > 0).all()
    assert ((drawn[..., 3] > -1) & (drawn[..., 3] < 3)).all()
