"""Data that are given something, or miss features, in everything that takes data."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal

import dgm_pyro as dgm
from dgm_pyro.uses import anomaly


def pairs(size=200):
    """Pairs of given and x, where x = 2 given - 1 + 0.5 noise."""
    c = torch.randn(size, 1)
    return c, 2 * c - 1 + 0.5 * torch.randn(size, 1)


class Pair(nn.Linear):
    """A linear network of two features, z or x and what is given."""

    def __init__(self):
        super().__init__(2, 2)

    def forward(self, first, second):
        return super().forward(torch.cat([first, second], 1))


def linear(slope, intercept, scale):
    """p(x | c) = N(slope c + intercept, scale^2)."""
    program = dgm.Normal(1, lambda size: nn.Linear(1, size))
    with torch.no_grad():
        program.network.weight[:] = torch.tensor([[slope], [0.0]])
        program.network.bias[:] = torch.tensor([intercept, torch.tensor(scale).expm1().log()])
    return program


def test_evidence_is_that_of_each_datum_given_its_own():
    c, x = pairs()
    program = linear(2.0, -1.0, 0.5)
    evidence = dgm.evaluate(program, dgm.Data(x, given=c), batch_size=64)
    exact = Normal(2 * c - 1, 0.5).log_prob(x)[:, 0].double()
    torch.testing.assert_close(evidence.values, exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(evidence.values, program.log_prob(x, c).double(), rtol=0, atol=0)
    assert (evidence.kind, evidence.measure) == ("exact", "density")


def test_fit_finds_the_least_squares_line():
    c, x = pairs()
    program = dgm.Normal(1, lambda size: nn.Linear(1, size), scale_type="shared")
    dgm.fit(program, dgm.Data(x, given=c), epochs=200, batch_size=100, lr=3e-2, validation=None, progress=False)
    design = torch.cat([c, torch.ones_like(c)], 1)
    line = torch.linalg.lstsq(design, x).solution
    found = torch.cat([program.network.weight[0], program.network.bias])
    torch.testing.assert_close(found.detach(), line[:, 0], rtol=0, atol=2e-3)
    assert abs(program(c).variance.mean() - (x - design @ line).square().mean()) < 2e-3


def test_validation_and_augmentation_keep_what_is_given():
    c, x = pairs(60)
    held_out = dgm.Data(*pairs(40)[::-1][:1], given=pairs(40)[0])
    program = linear(2.0, -1.0, 0.5)
    training = dgm.Training(
        program, dgm.Data(x, given=c), options=dgm.TrainingOptions(epochs=1, lr=1e-12, batch_size=60),
        validation=held_out, augment=lambda x: x + 1,
    )  # fmt: skip
    with training:
        epoch = training.advance()
    assert abs(epoch.loss + program.log_prob(x + 1, c).mean()) < 1e-5
    assert abs(epoch.validation + program.log_prob(held_out.x, held_out.given).mean()) < 1e-5


def test_a_bound_and_its_latents_read_what_is_given():
    c, x = pairs(20)
    vae = dgm.VAE(
        dgm.Normal(1),
        dgm.Normal(1, Pair(), given_shape=((1,), (1,))),
        dgm.Normal(1, Pair(), given_shape=((1,), (1,))),
    )
    data = dgm.Data(x, given=c)
    first = dgm.evaluate(vae, data)
    assert first.kind == "elbo"
    assert not torch.equal(first.values, dgm.evaluate(vae, dgm.Data(x, given=c + 1)).values)
    z = dgm.representations.represent(vae, data).z
    torch.testing.assert_close(z, vae.encoder((x, c)).mean.detach())
    assert set(dgm.infer.units(vae, data)) == {"z"}
    assert dgm.doctor(vae, data).ok


def test_evidences_of_data_that_differ_in_what_is_given_are_not_paired():
    c, x = pairs(20)
    program = linear(2.0, -1.0, 0.5)
    evidence = dgm.evaluate(program, dgm.Data(x, given=c))
    assert evidence.minus(dgm.evaluate(program, dgm.Data(x, given=c))).nats == 0
    with pytest.raises(ValueError, match="of different data"):
        evidence.minus(dgm.evaluate(program, dgm.Data(x, given=c.flip(0))))


def test_evidences_of_labels_of_other_x_are_not_paired():
    x, y = torch.randn(6, 2), torch.arange(6) % 3
    program = dgm.Discriminative(dgm.Categorical((), 3, nn.Linear(2, 3)))
    evidence = dgm.evaluate(program, dgm.Data(x, y))
    with pytest.raises(ValueError, match="of different data"):
        evidence.minus(dgm.evaluate(program, dgm.Data(x + 1, y)))


CONDITIONAL, PLAIN = linear(1.0, 0.0, 1.0), dgm.Normal(1, learned=True)
OF_CLASSES = dgm.Normal(1, nn.Embedding(3, 2))
X, C, Y = torch.zeros(6, 1), torch.zeros(6, 1), torch.arange(6) % 3
MISFITS = {
    "nothing given": (CONDITIONAL, dgm.Data(X), r"is conditional: pass Data\(x, given=.*which data does not have"),
    "a label": (CONDITIONAL, dgm.Data(X, Y), r"pass Data\(x, given=\.\.\.\), of shape \(B, \*\(1,\)\)"),
    "no label": (OF_CLASSES, dgm.Data(X, given=C), r"pass Data\(x, y\), one integer label in 0 .. 2"),
    "given too much": (OF_CLASSES, dgm.Data(X, Y, given=C), r"given of shape \(6, 1\), which this Normal does"),
    "given to the unconditional": (PLAIN, dgm.Data(X, given=C), "does not read: leave given out"),
    "given to a classifier": (
        dgm.Labeled(dgm.Categorical((), 3, learned=True), OF_CLASSES),
        dgm.Data(X, Y, given=C),
        "which this Labeled does not read",
    ),
    "given of another shape": (CONDITIONAL, dgm.Data(X, given=torch.zeros(6, 2)), "the program's given_shape is"),
    "missing features": (
        dgm.flow.maf(1, layers=1), dgm.Data(X, mask=Y[:, None] > 0), "this Flow cannot leave the missing ones out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
@pytest.mark.parametrize("take", [dgm.evaluate, dgm.fit])
def test_data_that_a_program_cannot_read_are_refused_by_name(case, take):
    program, data, words = MISFITS[case]
    with pytest.raises(ValueError, match=words):
        take(program, data)


def test_scores_and_classifiers_refuse_missing_features():
    data = MISFITS["missing features"][1]
    with pytest.raises(ValueError, match=r"a score takes only complete rows.*--normal"):
        anomaly.Detector(PLAIN).calibrate(data)
    with pytest.raises(ValueError, match="a Bayesian takes only complete rows"):
        dgm.classification.Bayesian(nn.Linear(1, 3), dgm.Data(X, Y, mask=data.mask))


def test_a_mask_that_hides_nothing_changes_nothing():
    whole = dgm.Data(torch.randn(5, 1), mask=torch.ones(5, 1, dtype=torch.bool))
    assert torch.equal(dgm.evaluate(PLAIN, whole).values, PLAIN.log_prob(whole.x).detach().double())
