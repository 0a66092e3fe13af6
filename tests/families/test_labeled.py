"""Generative and discriminative classifiers: the sum rule and Bayes' rule by hand, over every family.

Statistical tests are seeded; z-scores are held to 4.5 standard errors, p-values to 1e-4.
"""

import math

import pyro
import pytest
import torch
import torch.nn.functional as F
from programs import CASES, assert_same_number, diffusion
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from scipy import stats
from torch import nn
from torch.distributions import Normal

import dgm_pyro as dgm
from dgm_pyro import Labeled, SemiSupervised, noise
from dgm_pyro.networks import MLP, ConvEncoder
from dgm_pyro.objectives import elbo

pytestmark = pytest.mark.usefixtures("float64")

LABELED = [name for name, case in CASES.items() if isinstance(case.example, Labeled)]
EXACT = [name for name in LABELED if CASES[name].example.tractable]
CLASSES = 3


def gaussians(loc, scale=1.0, prior=None):
    """p(x | y) = N(loc_y, scale^2) in one dimension."""
    raw = torch.tensor([[m, math.log(math.expm1(scale))] for m in loc])
    embedding = nn.Embedding.from_pretrained(raw, freeze=False)
    logits = torch.zeros(len(loc)) if prior is None else torch.tensor(prior).log()
    return Labeled(dgm.Categorical((), len(loc), parameters=logits), dgm.Normal(1, embedding))


def classifier(features=2, classes=CLASSES):
    return dgm.Categorical((), classes, MLP((features,), classes, hidden=(6,)))


def labeled_vae(with_classifier=True):
    torch.manual_seed(0)
    inner = dgm.VAE(
        dgm.Normal(1),
        dgm.Normal(2, MLP((1,), 4, hidden=(6,), num_classes=CLASSES)),
        dgm.Normal(1, MLP((2,), 2, hidden=(6,), num_classes=CLASSES)),
    )
    prior = dgm.Categorical((), CLASSES, parameters=torch.tensor([0.3, -0.2, 0.9]), learned=True)
    return Labeled(prior, inner, classifier() if with_classifier else None)


def assert_mean(values, expected, sigmas=4.5):
    z = (values.mean() - expected) / (values.std() / len(values) ** 0.5 + 1e-12)
    assert abs(z.item()) < sigmas, f"mean {values.mean():.5f} is {z:.1f} standard errors from {float(expected):.5f}"


# -- the sum rule and Bayes' rule --------------------------------------------------------------------------------------


def test_two_gaussians_by_pencil():
    """p(y = 1 | x) = sigmoid(2 x + log 3) for means -1 and 1 and p(y = 1) = 3 / 4."""
    program = gaussians([-1.0, 1.0], prior=[0.25, 0.75])
    x = torch.linspace(-3, 3, 13).unsqueeze(-1)
    expected = torch.sigmoid(2 * x.squeeze(-1) + math.log(3))
    probabilities = program.class_probabilities(x)
    torch.testing.assert_close(probabilities[:, 1], expected)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(13))
    torch.testing.assert_close(program.classify(x), (expected > 0.5).long())
    mixture = 0.25 * Normal(-1, 1).log_prob(x).exp() + 0.75 * Normal(1, 1).log_prob(x).exp()
    torch.testing.assert_close(program.log_prob(x), mixture.log().squeeze(-1))


@pytest.mark.parametrize("name", EXACT)
def test_sum_rule_and_bayes_rule_over_exact_families(name):
    case = CASES[name]
    program = case.build()
    x, _ = case.draw(program, 5)
    log_prior = program.prior().probs.log()
    log_joint = torch.stack(
        [program.program.log_prob(x, torch.full((5,), y)) + log_prior[y] for y in range(program.num_labels)]
    )
    torch.testing.assert_close(program.log_joint(x), log_joint)
    torch.testing.assert_close(program.log_prob(x), log_joint.logsumexp(0))
    torch.testing.assert_close(program.class_probabilities(x), log_joint.softmax(0).T)
    assert torch.equal(program.classify(x), log_joint.argmax(0))


@pytest.mark.parametrize("name", [name for name in LABELED if name not in EXACT])
def test_bayes_rule_over_bounded_families_weighs_the_bounds(name):
    case = CASES[name]
    program = case.build().eval()
    x, _ = case.draw(program, 5)
    log_joint = program.log_joint(x, num_particles=4, seed=3)
    for y in range(program.num_labels):
        with noise.per_datum(x, seed=3):
            weights = program.program.log_weights(x, torch.full((5,), y), 4)
        expected = weights.exp().mean(0).log() + program.prior().probs[y].log()
        torch.testing.assert_close(log_joint[y], expected)
    torch.testing.assert_close(program.class_probabilities(x, 4, seed=3), log_joint.softmax(0).T)
    assert torch.equal(program.classify(x, 4, seed=3), log_joint.argmax(0))
    assert not program.class_probabilities(x).requires_grad


def test_classes_are_compared_at_the_same_draws():
    """Where x does not depend on y, p(y | x) is p(y), and no noise of the bounds may say otherwise."""

    class Indifferent(nn.Module):
        num_classes = 3

        def __init__(self, in_shape):
            super().__init__()
            self.network, self.in_shape, self.given_shape = nn.Linear(1, 2), torch.Size(in_shape), torch.Size(())

        def forward(self, x, y):
            return self.network(x)

    inner = dgm.VAE(dgm.Normal(1), dgm.Normal(1, Indifferent((1,))), dgm.Normal(1, Indifferent((1,))))
    program = Labeled(dgm.Categorical((), 3, parameters=torch.tensor([0.3, -0.2, 0.9])), inner)
    x = torch.randn(5, 1)
    for particles in (1, 3):
        probabilities = program.class_probabilities(x, particles)
        torch.testing.assert_close(probabilities, program.prior().probs.expand(5, 3))
    assert not torch.equal(program.log_joint(x, seed=1), program.log_joint(x))  # but other draws for another seed


def test_many_particles_classify_as_the_exact_evidence_does():
    """A linear-Gaussian VAE per class has an exact evidence; its guide here is a poor one."""
    torch.manual_seed(0)
    decode = nn.Sequential(nn.Linear(1, 2))
    with torch.no_grad():
        decode[0].weight.copy_(torch.tensor([[0.8], [0.0]]))
        decode[0].bias.copy_(torch.tensor([0.0, math.log(math.expm1(0.5))]))

    class Shifted(nn.Module):
        """x given z and y is N(0.8 z + shift_y, 0.5^2)."""

        in_shape, given_shape = torch.Size((1,)), torch.Size(())
        num_classes = 2

        def __init__(self):
            super().__init__()
            self.decode = decode

        def forward(self, z, y):
            return self.decode(z) + torch.stack([2.0 * y - 1, 0.0 * y], -1)

    guide = nn.Linear(1, 2)
    with torch.no_grad():
        guide.weight.copy_(torch.tensor([[0.3], [0.0]]))
        guide.bias.copy_(torch.tensor([0.0, math.log(math.expm1(1.0))]))
    inner = dgm.VAE(dgm.Normal(1), dgm.Normal(1, Shifted()), dgm.Normal(1, guide))
    program = Labeled(dgm.Categorical((), 2), inner)
    x = torch.tensor([[-0.7], [0.1], [1.4]])
    scale = math.sqrt(0.8**2 + 0.5**2)
    log_joint = torch.stack([Normal(shift, scale).log_prob(x.squeeze(-1)) for shift in (-1.0, 1.0)])
    torch.testing.assert_close(program.class_probabilities(x, 20000), log_joint.softmax(0).T, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", EXACT)
def test_bayes_rule_as_the_guide_leaves_no_gap_and_no_noise(name):
    case = CASES[name]
    program = case.build()
    x, _ = case.draw(program, 5)
    weights = program.log_weights(x, num_particles=6)
    torch.testing.assert_close(weights, program.log_prob(x).expand(6, 5))
    assert pyro.infer.Trace_ELBO().loss(program.model, program.guide, x) == pytest.approx(
        -program.log_prob(x).sum().item()
    )


@pytest.mark.parametrize("name", LABELED)
def test_the_guide_draws_labels_from_the_posterior_it_names(name):
    case = CASES[name]
    program = case.build().eval()
    x, _ = case.draw(program, 1)
    n = 4000
    drawn = poutine.trace(program.guide).get_trace(x.expand(n, *x.shape[1:])).nodes[program.label_name]["value"]
    if program.classifier is not None:
        probabilities = program.classifier(x).probs[0]
    else:
        probabilities = program.class_probabilities(x)[0] if program.tractable else program.prior().probs
    counts = torch.bincount(drawn, minlength=program.num_labels)
    expected = n * probabilities.detach()
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-4


# -- enumeration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_enumerated_labels_give_the_exact_evidence(name):
    case = CASES[name]
    program = case.build()
    x, _ = case.draw(program, 5)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(program.model, config_enumerate(program.guide), x)
    assert loss == pytest.approx(-program.log_prob(x).sum().item())


@pytest.mark.parametrize("guide", ["classifier", "prior"])
def test_enumeration_is_the_sum_over_labels_at_the_latents_drawn(guide):
    """TraceEnum_ELBO draws one z per label; at these, the sum over labels by hand is the same number."""
    program = labeled_vae(guide == "classifier")
    x = torch.randn(4, 2)
    enumerated = config_enumerate(program.guide)
    torch.manual_seed(3)
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(program.model, enumerated, x)

    torch.manual_seed(3)
    with poutine.enum(first_available_dim=-2):
        trace = poutine.trace(enumerated).get_trace(x)
    z = trace.nodes["z"]["value"]
    assert z.shape == (CLASSES, 4, 1)
    q_y = program.classifier(x).probs if guide == "classifier" else program.prior().probs.expand(4, CLASSES)
    by_hand = 0
    for label in range(CLASSES):
        y, inner = torch.full((4,), label), program.program
        log_p = program.prior().log_prob(y) + inner.prior().log_prob(z[label])
        log_p = log_p + inner.likelihood((z[label], y)).log_prob(x)
        log_q = q_y[:, label].log() + inner.encoder((x, y)).log_prob(z[label])
        by_hand = by_hand + (q_y[:, label] * (log_p - log_q)).sum()
    torch.testing.assert_close(loss, -by_hand)


# -- semi-supervised ---------------------------------------------------------------------------------------------------


def test_with_all_labels_unknown_it_is_the_enumerated_bound():
    """Over an exact p(x | y) nothing is drawn, so that the numbers are equal, gradients too."""
    program = Labeled(
        dgm.Categorical((), CLASSES, parameters=torch.tensor([0.3, -0.2, 0.9]), learned=True),
        dgm.Normal(2, nn.Embedding(CLASSES, 4)),
        classifier(),
    )
    x = torch.randn(5, 2)
    ours = SemiSupervised()(program, x)
    theirs = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(program.model, config_enumerate(program.guide), x)
    torch.testing.assert_close(ours.value.sum(), -theirs)
    parameters = [*program.parameters()]
    for a, b in zip(
        torch.autograd.grad(ours.surrogate.sum(), parameters), torch.autograd.grad(-theirs, parameters), strict=True
    ):
        torch.testing.assert_close(a, b)
    by_hand = 0
    q = program.classifier(x).probs
    for label in range(CLASSES):
        y = torch.full((5,), label)
        log_p = program.program.log_prob(x, y) + program.prior().log_prob(y)
        by_hand = by_hand + q[:, label] * (log_p - q[:, label].log())
    torch.testing.assert_close(ours.value, by_hand)
    assert (ours.value < program.log_prob(x)).all()


@pytest.mark.parametrize("weight", [0.0, 1.0, 7.5])
def test_known_and_unknown_labels_each_get_their_bound(weight):
    """Kingma et al. 2014, equations 6 to 9, datum by datum, at the latents that were drawn."""
    assert SemiSupervised(weight).formula == (
        rf"L(x, y) + {weight:g} \log q(y \mid x) \quad \mathrm{{or}} \quad "
        r"\sum_y q(y \mid x) [L(x, y) - \log q(y \mid x)], \quad "
        r"L(x, y) = E_{q(z \mid x, y)} [\log p(x, y, z) - \log q(z \mid x, y)]"
    )
    program = labeled_vae()
    x, y = torch.randn(6, 2), torch.tensor([2, -1, 0, -1, -1, 1])
    torch.manual_seed(3)
    bound = SemiSupervised(weight)(program, x, observed={"y": y})
    assert bound.value.shape == (6,)
    torch.testing.assert_close(bound.surrogate, bound.value)

    known, unknown, inner = [0, 2, 5], [1, 3, 4], program.program
    torch.manual_seed(3)
    q_z = inner.encoder((x[known], y[known]))
    z = q_z.rsample()
    log_p = program.prior().log_prob(y[known]) + inner.likelihood((z, y[known])).log_prob(x[known])
    expected = (
        log_p
        - torch.distributions.kl_divergence(q_z, inner.prior())
        + weight * torch.log_softmax(program.classifier.network(x[known]), -1).gather(1, y[known, None]).squeeze(1)
    )
    torch.testing.assert_close(bound.value[known], expected)

    labels = torch.arange(CLASSES).unsqueeze(-1).expand(CLASSES, 3)
    q_z = inner.encoder((x[unknown].expand(CLASSES, 3, 2), labels))
    z = q_z.rsample()
    log_p = program.prior().log_prob(labels) + inner.likelihood((z, labels)).log_prob(x[unknown])
    q_y = torch.softmax(program.classifier.network(x[unknown]), -1).T
    each = log_p - torch.distributions.kl_divergence(q_z, inner.prior().expand((CLASSES, 3))) - q_y.log()
    torch.testing.assert_close(bound.value[unknown], (q_y * each).sum(0))


def test_with_every_label_tried_a_network_of_x_alone_runs_once():
    """Rows that the encoder q(z | x) and the likelihood p(x | z, y) see: B, and B for each label."""
    program = Labeled(
        dgm.Categorical((), CLASSES),
        dgm.VAE(
            dgm.Normal(1),
            dgm.Normal(2, dgm.networks.MLP((1,), 4, hidden=(5,), num_classes=CLASSES)),
            dgm.Normal(1, nn.Linear(2, 2)),
        ),
        classifier(),
    )
    seen = {"encoder": 0, "likelihood": 0}
    for role in seen:
        network = getattr(program.program, role).network
        network.register_forward_pre_hook(lambda _, inputs, role=role: seen.update({role: len(inputs[0])}))
    bound = SemiSupervised()(program, torch.randn(7, 2))
    assert seen == {"encoder": 7, "likelihood": 7 * CLASSES}
    # z is drawn anew for each label, so that the bound is that of the enumerating objective in expectation.
    torch.manual_seed(1)
    x = torch.randn(3, 2).repeat(2000, 1)
    ours, theirs = (objective(program, x).value.reshape(2000, 3) for objective in (SemiSupervised(), dgm.Enumerate()))
    error = (ours.var(0) / 2000 + theirs.var(0) / 2000).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4.5 * error).all()
    assert torch.isfinite(bound.value).all()


def test_a_label_of_another_name_is_the_same_label():
    program, x, y = labeled_vae(), torch.randn(4, 2), torch.tensor([2, -1, 0, 1])
    renamed = Labeled(program.prior, program.program, program.classifier, label_name="digit")
    bounds = []
    for labeled, name in ((program, "y"), (renamed, "digit")):
        torch.manual_seed(3)
        bounds.append(SemiSupervised()(labeled, x, observed={name: y}).value)
    torch.testing.assert_close(*bounds)


def test_all_known_and_all_unknown_are_no_special_cases():
    program, x = labeled_vae(), torch.randn(3, 2)
    for y in (torch.tensor([0, 2, 1]), torch.tensor([-1, -1, -1])):
        torch.manual_seed(3)
        bound = SemiSupervised()(program, x, observed={"y": y})
        assert torch.isfinite(bound.value).all()
    torch.manual_seed(3)
    torch.testing.assert_close(SemiSupervised()(program, x).value, bound.value)


def test_a_few_labels_and_many_without_find_the_classes():
    torch.set_default_dtype(torch.float32)
    y = torch.arange(600) % 2
    x = torch.stack([4.0 * y - 2, torch.zeros(600)], -1) + torch.randn(600, 2)
    given = torch.where(torch.arange(600) < 6, y, torch.full_like(y, -1))
    program = Labeled(dgm.Categorical((), 2, learned=True), dgm.Normal(2, nn.Embedding(2, 4)), classifier(classes=2))
    history = dgm.fit(
        program,
        dgm.Data(x, given, num_classes=2),
        "semi-supervised",
        epochs=20,
        lr=2e-2,
        validation=dgm.Data(x[:100], y[:100]),
        progress=False,
    )
    assert history.losses[-1] < history.losses[0]
    exact = torch.sigmoid(4 * x[:, 0]).round().long()  # Bayes' rule with the true densities
    assert (program.classify(x) == exact).double().mean() > 0.97
    assert (program.classifier(x).probs.argmax(-1) == exact).double().mean() > 0.97


# -- learning and drawing ----------------------------------------------------------------------------------------------


def test_a_learned_prior_becomes_the_frequencies_of_the_classes():
    torch.set_default_dtype(torch.float32)
    y = torch.tensor([0] * 200 + [1] * 500 + [2] * 100)
    x = y.unsqueeze(-1).float() + 0.1 * torch.randn(800, 1)
    program = Labeled(dgm.Categorical((), 3, learned=True), dgm.Normal(1, nn.Embedding(3, 2)))
    dgm.fit(program, dgm.Data(x, y), epochs=60, batch_size=100, lr=5e-2, validation=None, progress=False)
    torch.testing.assert_close(program.prior().probs, torch.tensor([0.25, 0.625, 0.125]), rtol=0, atol=5e-3)
    components = program.program(torch.arange(3))
    torch.testing.assert_close(components.mean.squeeze(), torch.tensor([0.0, 1.0, 2.0]), rtol=0, atol=0.03)
    assert (program.classify(x) == y).double().mean() > 0.99


def test_labels_are_observed_where_the_data_have_them():
    program = CASES["labeled"].build()
    x, y = torch.randn(4, 2), torch.tensor([0, 2, 1, 1])
    value, given, observed = program.arguments(dgm.Data(x, y))
    assert given is None
    assert torch.equal(observed["y"], y)
    expected = program.program.log_prob(x, y) + program.prior().log_prob(y)
    bound = elbo(program, value, given, observed=observed)
    torch.testing.assert_close(bound.value, expected)
    assert set(bound.reconstruction) == {"x", "y"}
    assert program.arguments(dgm.Data(x)) == (x, None, {})


def test_samples_of_a_class_and_of_all():
    program = gaussians([-5.0, 0.0, 5.0], 0.5, [0.2, 0.5, 0.3])
    y = torch.tensor([2, 0, 1, 2])
    x = program.sample(4, given=y)
    assert (x.squeeze(-1) - torch.tensor([5.0, -5, 0, 5])).abs().max() < 2.5
    assert (program.sample(50, given=torch.tensor([0])) < -2.5).all()
    x = program.sample(5000)
    counts = torch.bincount(((x.squeeze(-1) + 7.5) // 5).long(), minlength=3)
    assert stats.chisquare(counts, [1000, 2500, 1500]).pvalue > 1e-4


def test_options_of_sampling_reach_the_program():
    program = Labeled(dgm.Categorical((), 3), diffusion(2, num_classes=3, label_dropout=0.1)).eval()
    y = torch.tensor([0, 1, 2])
    torch.manual_seed(0)
    expected = program.program.sample(3, y, sampler="ddim", guidance=2.0, num_steps=2)
    torch.manual_seed(0)
    assert torch.equal(program.sample(3, y, sampler="ddim", guidance=2.0, num_steps=2), expected)


def test_samples_follow_the_density():
    program = gaussians([-1.0, 2.0], 0.7, [0.3, 0.7])
    x = program.sample(4000).squeeze(-1)
    cdf = lambda v: 0.3 * stats.norm.cdf(v, -1, 0.7) + 0.7 * stats.norm.cdf(v, 2, 0.7)  # noqa: E731
    assert stats.kstest(x.numpy(), cdf).pvalue > 1e-4


def test_plain_svi_trains_both_factors():
    torch.set_default_dtype(torch.float32)
    program = Labeled(dgm.Categorical((), 2, learned=True), dgm.Normal(1, nn.Embedding(2, 2)))
    x = torch.cat([torch.randn(100, 1) - 3, torch.randn(300, 1) + 3])
    svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 5e-2}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(200)]
    exact = -((0.25 * Normal(-3, 1).log_prob(x).exp() + 0.75 * Normal(3, 1).log_prob(x).exp()).log().sum().item())
    assert losses[-1] < 1.02 * exact


# -- what it is built from ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Labeled(dgm.Normal(1), dgm.Normal(1, nn.Embedding(3, 2))), TypeError, "prior must be a Categorical"),
        (
            lambda: Labeled(dgm.Categorical(2, 3), dgm.Normal(1, nn.Embedding(3, 2))),
            TypeError,
            r"prior must be a Categorical of event_shape \(\)",
        ),
        (
            lambda: Labeled(classifier(), dgm.Normal(2, nn.Embedding(3, 4))),
            ValueError,
            r"prior is p\(y\), given nothing",
        ),
        (lambda: Labeled(dgm.Categorical((), 3), nn.Linear(1, 1)), TypeError, "program must be a dgm.Program"),
        (
            lambda: Labeled(dgm.Categorical((), 3), dgm.Normal(1)),
            ValueError,
            "program is given a label.*not conditional",
        ),
        (
            lambda: Labeled(dgm.Categorical((), 4), dgm.Normal(1, nn.Embedding(3, 2))),
            ValueError,
            "program has 3 classes, but the prior has 4",
        ),
        (
            lambda: Labeled(dgm.Categorical((), 3), dgm.Normal(1, nn.Linear(2, 2), given_shape=(2,))),
            ValueError,
            r"program expects given_shape \(2,\)",
        ),
        (
            lambda: Labeled(dgm.Categorical((), 3), dgm.Normal(2, nn.Embedding(3, 4)), classifier(classes=4)),
            ValueError,
            "classifier has 4 classes, but the prior has 3",
        ),
        (
            lambda: Labeled(dgm.Categorical((), 3), dgm.Normal(2, nn.Embedding(3, 4)), classifier(features=5)),
            ValueError,
            r"classifier expects given_shape \(5,\)",
        ),
        (
            lambda: Labeled(dgm.Categorical((), 3), dgm.Normal(2, nn.Embedding(3, 4)), dgm.Categorical((), 3)),
            ValueError,
            "classifier is given.*not conditional",
        ),
        (
            lambda: Labeled(dgm.Categorical((), 3), labeled_vae().program, label_name="z"),
            ValueError,
            "two latents of this Labeled are named 'z'",
        ),
        (
            lambda: Labeled(dgm.Categorical((), 3), dgm.Normal(2, nn.Embedding(3, 4)), label_name="x"),
            ValueError,
            "two latents of this Labeled are named 'x'",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_questions_that_do_not_fit_are_refused():
    program = CASES["labeled"].build()
    with pytest.raises(ValueError, match=r"x has shape \(4, 3\)"):
        program.classify(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="not conditional"):
        program.log_prob(torch.zeros(4, 2), torch.zeros(4).long())
    with pytest.raises(ValueError, match="labels from 3 to 3"):
        program.sample(2, given=torch.tensor([3]))
    with pytest.raises(dgm.IntractableError, match="log_weights"):
        labeled_vae().log_prob(torch.zeros(4, 2))


# -- the discriminative one --------------------------------------------------------------------------------------------


def test_discriminative_is_logistic_regression():
    torch.manual_seed(0)
    network = nn.Linear(2, 3)
    program = dgm.Discriminative(dgm.Categorical((), 3, network))
    x, y = torch.randn(6, 2), torch.tensor([0, 1, 2, 2, 1, 0])
    torch.testing.assert_close(-program.log_prob(y, x).mean(), F.cross_entropy(network(x), y))
    torch.testing.assert_close(program.class_probabilities(x), network(x).softmax(-1))
    assert torch.equal(program.classify(x), network(x).argmax(-1))
    assert program.sample(6, x).shape == (6,)
    evidence = dgm.evaluate(program, dgm.Data(x, y))
    assert evidence.kind == "exact"
    assert evidence.nats == pytest.approx(-F.cross_entropy(network(x), y).item())
    assert evidence.bits_per_dim == pytest.approx(F.cross_entropy(network(x), y).item() / math.log(2))


def test_discriminative_fits_as_plain_torch_does():
    """Full batches, no decay, constant rate: the same steps as AdamW on the cross-entropy."""
    x, y = torch.randn(64, 2), torch.randint(3, (64,))
    start = nn.Linear(2, 3)
    program = dgm.Discriminative(dgm.Categorical((), 3, nn.Linear(2, 3)))
    program.classifier.network.load_state_dict(start.state_dict())
    dgm.fit(
        program,
        dgm.Data(x, y),
        epochs=40,
        batch_size=64,
        lr=1e-2,
        lr_schedule="constant",
        validation=None,
        progress=False,
    )
    optimizer = torch.optim.AdamW(start.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(start(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(program.classifier.network.weight, start.weight, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(program.classifier.network.bias, start.bias, rtol=1e-6, atol=1e-8)


def test_generative_and_discriminative_agree_where_both_are_right():
    """Gaussian classes of one scale have a linear log odds: both find the same p(y | x)."""
    y = torch.arange(4000) % 2
    x = (2.0 * y - 1).unsqueeze(-1) + torch.randn(4000, 1)
    data = dgm.Data(x, y)
    generative = gaussians([-0.5, 0.1])
    discriminative = dgm.Discriminative(dgm.Categorical((), 2, nn.Linear(1, 2)))
    for program in (generative, discriminative):
        dgm.fit(program, data, epochs=15, batch_size=200, lr=5e-2, validation=None, progress=False)
    grid = torch.linspace(-2, 2, 9).unsqueeze(-1)
    exact = torch.sigmoid(2 * grid.squeeze(-1))
    for program in (generative, discriminative):
        torch.testing.assert_close(program.class_probabilities(grid)[:, 1], exact, rtol=0, atol=0.03)


BYTES = torch.tensor([[0, 5], [16, 3]], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (BYTES.long() - 1, ValueError, "x holds values from -1 to 15, but the x of a Discriminative has 17 levels"),
        (BYTES.long() + 1, ValueError, "x holds values from 1 to 17, but the x of a Discriminative has 17 levels"),
        (BYTES.double() + 0.5, ValueError, "x holds 0.5, but the x of a Discriminative is a mass"),
        (BYTES > 4, TypeError, "x has dtype torch.bool"),
        (BYTES.double() + math.nan, ValueError, "NaN"),
    ],
)
@pytest.mark.parametrize(
    "build",
    [
        lambda: MLP((2,), 3, levels=17),
        lambda: nn.Sequential(nn.Unflatten(1, (1, 1, 2)), ConvEncoder((1, 1, 2), 3, channels=(4,), levels=17)),
    ],
)
def test_discriminative_checks_the_values_of_x(build, x, error, words):
    network = build()
    program = dgm.Discriminative(dgm.Categorical((), 3, network, given_shape=(2,)))
    assert_same_number(program.class_probabilities(BYTES), network(BYTES).softmax(-1))
    for ask in (program.class_probabilities, program.classify, lambda x: program.log_prob(torch.zeros(2).long(), x)):
        with pytest.raises(error, match=words):
            ask(x)


def test_discriminative_of_reals_refuses_nan_and_leaves_integers_to_its_network():
    with pytest.raises(ValueError, match="NaN"):
        dgm.Discriminative(dgm.Categorical((), 3, nn.Linear(2, 3))).classify(torch.full((1, 2), math.nan))
    words = nn.Sequential(nn.Embedding(50, 4), nn.Flatten(), nn.Linear(8, 3))
    assert dgm.Discriminative(dgm.Categorical((), 3, words, given_shape=(2,))).classify(BYTES.long()).shape == (2,)


def test_discriminative_refuses_what_is_none():
    with pytest.raises(TypeError, match="classifier must be a Categorical of event_shape"):
        dgm.Discriminative(dgm.Categorical((), 3))
    with pytest.raises(TypeError, match="classifier must be a Categorical of event_shape"):
        dgm.Discriminative(dgm.Categorical(2, 3, nn.Linear(2, 6)))
    program = dgm.Discriminative(classifier())
    with pytest.raises(ValueError, match="models labels, but the data have none"):
        dgm.evaluate(program, dgm.Data(torch.zeros(3, 2)))
    with pytest.raises(TypeError, match=r"Data\(x, y\) with labels"):
        dgm.evaluate(program, torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"x has shape \(3, 5\)"):
        program.classify(torch.zeros(3, 5))
