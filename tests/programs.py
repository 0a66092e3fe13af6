"""The registry of small programs that drives the tests: one line here is one program tested, everywhere.

    CASES["my-family"] = Case(lambda: dgm.MyFamily(3))

Example data are made from what the program declares: integers below its levels, or standard normal reals; and
``given`` from its `num_classes` and `given_shape`. A program that leaves its `given_shape` open says what to give.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

import dgm_pyro as dgm
from dgm_pyro import flow, guides, hierarchy, multiscale, networks, priors
from dgm_pyro.networks import (
    MADE,
    MLP,
    CausalTransformer,
    ColumnMADE,
    ColumnReader,
    ConvNet,
    DenoisingMLP,
    DenoisingTransformer,
    DenoisingUNet,
    EmbeddedGiven,
    ObservedInput,
    PixelCNN,
)
from dgm_pyro.program import batch_plates, latent_sites, log_prob_sum, seeded

CPU = torch.device("cpu")

Module = TypeVar("Module", bound=nn.Module)


def replicas(x, num):
    """``num`` of each x, doubles, apart by less than any tolerance: equal ones would have equal noise."""
    return x.expand(num, *x.shape[1:]) + 1e-12 * torch.randn(num, *x.shape[1:])


def jittered(module: Module, size: float = 0.3) -> Module:
    """``module`` with noise of that standard deviation added to its parameters: off its symmetric start, biases too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


def denoised_normal(x_t: Tensor, alpha: Tensor, sigma: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
    """E[x_0 | x_t] of data N(mean, S): mean + alpha S (alpha^2 S + sigma^2)^-1 (x_t - alpha mean), ``(B, D)``.

    alpha and sigma are ``(B, 1)``.
    """
    noisy = alpha.unsqueeze(-1) ** 2 * cov + sigma.unsqueeze(-1) ** 2 * torch.eye(len(mean))
    residual = (x_t - alpha * mean).unsqueeze(-1)
    return mean + alpha * (cov @ torch.linalg.solve(noisy, residual)).squeeze(-1)


@dataclass(frozen=True)
class Case:
    """How to make a tiny program, with parameters moved off their symmetric start, and data for it.

    Args:
        make: the constructor.
        given_shape: shape of one ``given``, where the program leaves it open; ``()`` for labels.
        data: ``data(size)`` makes x, where a default does not fit.
        jitter: standard deviation of the noise added to every parameter.
        certain: x is a function of its latents, so that a guide which does not know x has no finite bound.
        inert: parameters (prefixes of names) that no loss reaches, with the reason in a comment.
    """

    make: Callable[[], dgm.Program]
    given_shape: tuple[int, ...] | None = None
    data: Callable[[int], Tensor] | None = None
    jitter: float = 0.2
    inert: tuple[str, ...] = ()
    certain: bool = False

    def build(self, seed: int = 0, device: str = "cpu", dtype: torch.dtype | None = None) -> dgm.Program:
        """The program, in the default dtype or in ``dtype``, its parameters a function of the seed."""
        with precision(dtype or torch.get_default_dtype()), seeded(seed, CPU):
            program = jittered(self.make(), self.jitter)
        return program.to(device)

    @functools.cached_property
    def example(self) -> dgm.Program:
        """One of these programs to look at, where tests are chosen: it is built once, and no test may change it."""
        return self.build()

    @functools.cached_property
    def trainable(self) -> bool:
        """Whether there is something to learn, and data to learn it from."""
        return any(p.requires_grad for p in self.example.parameters()) and data_for(self, self.example) is not None

    def draw(
        self, program: dgm.Program, size: int, seed: int = 1, device: str = "cpu", dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Any]:
        """Example data of ``program``: x, ``(size, *event_shape)``, and given."""
        with precision(dtype or torch.get_default_dtype()), seeded(seed, CPU):
            x = self.data(size) if self.data else outcomes(program, size)
            given = self.contexts(program, size) if program.conditional else None
        move = lambda part: tuple(map(move, part)) if isinstance(part, tuple) else part.to(device)  # noqa: E731
        return x.to(device), None if given is None else move(given)

    def contexts(self, program: dgm.Program, size: int) -> Any:
        shape = program.given_shape if self.given_shape is None else self.given_shape
        assert shape is not None, "the program leaves its given_shape open: name one in the Case"
        if len(shape) > 0 and isinstance(shape[0], tuple):
            return tuple(context(part, program.num_classes, size) for part in shape)
        return context(shape, program.num_classes, size)


def outcomes(program: dgm.Program, size: int) -> Tensor:
    if program.levels is None:
        return torch.randn(size, *program.event_shape)
    return torch.randint(program.levels, (size, *program.event_shape), dtype=torch.uint8)


def context(shape: Any, num_classes: int | None, size: int) -> Tensor:
    return torch.randint(num_classes, (size,)) if tuple(shape) == () and num_classes else torch.randn(size, *shape)


@contextlib.contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# -- comparing numbers -------------------------------------------------------------------------------------------------


def assert_same_number(actual: Tensor, expected: Tensor, roundings: int = 100) -> None:
    """The same numbers by two computations: another batch shape, kernel or formula rounds each operation anew.

    ``roundings`` is how many operations lie behind one number, each off by an eps of the largest; integers are equal.
    """
    relative = roundings * torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0.0
    largest = max(1.0, expected.detach().abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=relative, atol=relative * largest)


# -- reading a program through plain Pyro ------------------------------------------------------------------------------


def guide_latents(program: dgm.Program, x: Tensor, given: Any = None) -> dict[str, Tensor]:
    """One draw of every latent from the guide."""
    trace = poutine.trace(program.guide).get_trace(x, given)
    return {name: trace.nodes[name]["value"].detach() for name in latent_sites(trace)}


def model_latents(program: dgm.Program, x: Tensor, given: Any = None) -> dict[str, Any]:
    """The latent sites of the model's own trace."""
    trace = poutine.trace(program.model).get_trace(x, given)
    return {name: trace.nodes[name] for name in latent_sites(trace)}


def log_joint(program: dgm.Program, x: Tensor, given: Any, latents: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """log p(x, latents | given) and log q(latents | x, given), each ``(B,)``, at the latents given."""
    terms = []
    for statements in (program.joint, program.posterior):
        conditioned = poutine.condition(statements, data=latents)
        with poutine.block(), poutine.trace() as traced, batch_plates((len(x),)):
            conditioned(program.variable, x, given)
        terms.append(log_prob_sum(traced.trace, (len(x),)))
    return terms[0], terms[1]


def score(program: dgm.Program, x: Tensor, given: Any = None, *, num_particles: int = 1) -> Tensor:
    """What a program is trained on: its log_prob if it has one, else the ELBO, ``(B,)``, in nats."""
    if program.tractable:
        return program.log_prob(x, given)
    return program.log_weights(x, given, num_particles=num_particles).mean(0)


def pyro_elbo(program: dgm.Program, x: Tensor, given: Any = None) -> float:
    """Pyro's own estimate of the ELBO of the whole batch, in nats."""
    return -pyro.infer.Trace_ELBO().loss(program.model, program.guide, x, given)


# -- the registry ------------------------------------------------------------------------------------------------------


@dgm.register
@dgm.register
class _Squash(nn.Module):
    """A linear map of integers 0 .. levels - 1, for networks that are not ours."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.to(self.linear.weight.dtype))


def counts(size: int, features: int) -> Tensor:
    return torch.poisson(torch.ones(size, features))


def table(network: nn.Module | None = None, learned: bool = False) -> dgm.Columns:
    """A table with a column of each kind; at most 9 parameters for each."""
    kinds = {"a": "real", "b": "positive", "c": "count", "d": ("bounded", -1.0, 3.0), "e": ("category", 3)}
    return dgm.Columns(
        kinds, network, shift=[0.5, 0.0, 0.0, 0.0, 0.0], scale=[2.0, 0.5, 1.0, 1.0, 1.0], learned=learned
    )


def rows(size: int) -> Tensor:
    """Rows of `table`."""
    columns = (
        torch.randn(size),
        torch.randn(size).exp(),
        torch.poisson(torch.ones(size)),
        4 * torch.rand(size) - 1,
        torch.randint(3, (size,)).to(torch.get_default_dtype()),
    )
    return torch.stack(columns, -1)


def _mlp(inputs: tuple[int, ...], outputs: int, **options: Any) -> MLP:
    return MLP(inputs, outputs, hidden=(6,), activation="tanh", **options)


def vae(prior: dgm.Program, size: int = 2, latent_name: str = "z", **context: Any) -> dgm.VAE:
    """A VAE of 2-D reals over a prior of ``size`` features."""
    return dgm.VAE(
        prior,
        dgm.Normal(2, _mlp((size,), 4, **context)),
        dgm.Normal(size, _mlp((2,), 2 * size, **context)),
        latent_name,
    )


def guided(
    encoder: Callable[..., dgm.Program], prior: dgm.Program | None = None, likelihood: dgm.Program | None = None
) -> dgm.VAE:
    """A VAE of 3-D reals over 2 features, its encoder made of the prior and the likelihood."""
    prior = prior or dgm.Normal(2, learned=True)
    likelihood = likelihood or dgm.Normal(3, _mlp((2,), 3), scale_type="feature")
    return dgm.VAE(prior, likelihood, encoder(prior, likelihood))


def codes(prior: dgm.Categorical | dgm.Autoregressive) -> dgm.VAE:
    """A VAE of 3-D reals over 2 codes of 3 values."""
    return dgm.VAE(dgm.OneHot(prior), dgm.Normal(3, _mlp((2, 3), 6)), dgm.OneHot(dgm.Categorical(2, 3, _mlp((3,), 6))))


def quantized(given_label: bool = False) -> dgm.VAE:
    """A VQ-VAE of 4x4 images of 3 levels, over 2x2 codes of 3 vectors."""
    codebook, labels = networks.Codebook(3, 2), {"num_classes": 3} if given_label else {}
    codes = transformer(dgm.Categorical, (2, 2), levels=3, **labels)
    encode = ConvNet((1, 4, 4), (2, 2, 2), 1, width=4, levels=3, **labels)
    decode = ConvNet((2, 2, 2), (1, 4, 4), 3, width=4, **labels)
    return dgm.VAE(
        dgm.Embedded(codes, codebook),
        dgm.Categorical((1, 4, 4), 3, decode),
        dgm.VectorQuantizer((2, 2, 2), encode, codebook),
    )


def one_hot(*shape: int) -> Tensor:
    """Rows that are 1 at one place, the last dimension's."""
    return torch.eye(shape[-1])[torch.randint(shape[-1], shape[:-1])]


def vamp(levels: int | None = None) -> dgm.VAE:
    """A VAE whose prior is its encoder at four points."""
    encoder = dgm.Normal(2, _mlp((3,), 4, levels=levels))
    likelihood = dgm.Normal(3, _mlp((2,), 6)) if levels is None else dgm.Categorical(3, levels, _mlp((2,), 3 * levels))
    start = torch.randn(4, 3) if levels is None else torch.randint(levels, (4, 3))
    return dgm.VAE(priors.VampPrior(encoder, start, levels), likelihood, encoder)


def ladder(levels: int) -> dgm.VAE:
    """A hierarchy of that many levels, guided from the top down."""
    prior: dgm.Program = dgm.Normal(1)
    encoder: dgm.Program = dgm.Normal(1, _mlp((3,), 2))
    for i, size in zip(range(levels, 1, -1), (2, 1), strict=False):
        (above,) = prior.event_shape
        prior = dgm.VAE(prior, dgm.Normal(size, _mlp((above,), 2 * size)), latent_name=f"z{i}")
        bottom = guides.PrecisionWeighted(dgm.Normal(size, _mlp((3,), 2 * size)), prior.likelihood)
        encoder = guides.TopDown(encoder, bottom, latent_name=f"z{i}")
    return dgm.VAE(prior, dgm.Normal(3, _mlp((*prior.event_shape,), 6)), encoder)


def continuous(
    shape: int | tuple[int, ...], levels: int | None = None, learned: bool = False, predict: str = "v", **network: Any
) -> dgm.ContinuousDiffusion:
    """A diffusion in continuous time between ends so near that the bound of a short chain is hardly below its own."""
    event_shape = (shape,) if isinstance(shape, int) else shape
    schedule = dgm.LogSNR(0.6, -0.6, learned_ends=learned, num_units=3 if learned else 0)
    return dgm.ContinuousDiffusion(
        shape, DenoisingMLP(event_shape, (6,), **network), schedule, num_steps=10, levels=levels, predict=predict
    )


def diffusion(shape: int | tuple[int, ...], levels: int | None = None, **options: Any) -> dgm.Diffusion:
    """A diffusion of few steps."""
    network = {name: options.pop(name) for name in ("num_classes", "given_shape") if name in options}
    event_shape = (shape,) if isinstance(shape, int) else shape
    denoiser = DenoisingMLP(event_shape, (8, 8), activation="tanh", **network)
    return dgm.Diffusion(shape, denoiser, levels=levels, **{"num_steps": 4, **options})


def made(
    family: Callable[..., dgm.IndependentConditional], shape: int | tuple[int, ...], **options: Any
) -> dgm.Autoregressive:
    """An autoregressive model of the features of ``family`` on a small MADE."""
    network = {
        name: options.pop(name)
        for name in ("order", "residual", "num_classes", "given_shape", "hidden")
        if name in options
    }
    number = family(shape, **options).num_parameters
    levels = 2 if family is dgm.Bernoulli else options.get("levels")
    return dgm.Autoregressive(
        family(shape, network=MADE(shape, number, levels=levels, **{"hidden": (8,), **network}), **options)
    )


def any_order(
    family: Callable[..., dgm.IndependentConditional], shape: int | tuple[int, ...], **options: Any
) -> dgm.AnyOrder:
    """An autoregressive model in any order of the features of ``family`` on a small MLP."""
    network = {name: options.pop(name) for name in ("num_classes", "given_shape") if name in options}
    plain = family(shape, **options)
    size, levels = plain.event_shape.numel(), 2 if family is dgm.Bernoulli else options.get("levels")
    mlp = _mlp((2 * size,), plain.num_parameters * size, **network)
    return dgm.AnyOrder(family(shape, network=ObservedInput(shape, mlp, levels=levels), **options))


def pixelcnn(levels: int, **context: Any) -> dgm.Autoregressive:
    """A PixelCNN of 2x2 images."""
    network = PixelCNN((1, 2, 2), levels, width=4, layers=2, levels=levels, **context)
    return dgm.Autoregressive(dgm.Categorical((1, 2, 2), levels, network))


def of_maps() -> dgm.Autoregressive:
    """A PixelCNN of 2x2 images given z, which reads feature maps of z at each pixel."""
    network = PixelCNN((1, 2, 2), 3, width=4, layers=2, levels=3, given_shape=(2, 2, 2))
    return dgm.Autoregressive(dgm.Categorical((1, 2, 2), 3, EmbeddedGiven(network, _mlp((2,), 8))))


def predicted(channels: int, **context: Any) -> dgm.Autoregressive:
    """A PixelCNN of 2x2 images of 17 levels, with predictions from neighbors."""
    shape, components = (channels, 2, 2), 4 if channels == 1 else 7
    network = PixelCNN(shape, 3 * components, width=4, layers=2, levels=17, **context)
    return dgm.Autoregressive(dgm.PredictedLogistic(shape, 17, components, network))


def transformer(
    family: Callable[..., dgm.IndependentConditional], shape: int | tuple[int, ...], **options: Any
) -> dgm.Autoregressive:
    """An autoregressive model of the features of ``family`` on a small transformer."""
    network = {name: options.pop(name) for name in ("order", "num_classes", "given_shape") if name in options}
    number = family(shape, **options).num_parameters
    levels = 2 if family is dgm.Bernoulli else options.get("levels")
    return dgm.Autoregressive(
        family(
            shape,
            network=CausalTransformer(shape, number, width=8, layers=2, heads=2, levels=levels, **network),
            **options,
        )
    )


def standardized(program: dgm.Program) -> dgm.Standardized:
    """The program of 2-D reals in other units."""
    return dgm.Standardized(program, shift=[0.5, -1.0], scale=[0.7, 1.6])


CASES: dict[str, Case] = {
    # Conditionals
    "normal": Case(lambda: dgm.Normal(3)),
    "normal-learned": Case(lambda: dgm.Normal(2, learned=True)),
    "normal-scalar": Case(lambda: dgm.Normal((), learned=True)),
    "normal-image": Case(lambda: dgm.Normal((1, 2, 2), learned=True)),
    "normal-given-vector-narrow": Case(lambda: dgm.Normal(3, nn.Linear(2, 6), initial_scale=0.05)),
    "normal-given-vector": Case(lambda: dgm.Normal(3, nn.Linear(2, 6))),
    "normal-given-open": Case(lambda: dgm.Normal(3, nn.Sequential(nn.Linear(2, 6))), given_shape=(2,)),
    "normal-given-label": Case(lambda: dgm.Normal(2, nn.Embedding(3, 4))),
    "normal-given-image": Case(lambda: dgm.Normal(2, _mlp((1, 3, 3), 4))),
    "normal-given-pair": Case(lambda: dgm.Normal(2, _mlp((3,), 4, num_classes=4))),
    "bernoulli": Case(lambda: dgm.Bernoulli(4)),
    "bernoulli-learned": Case(lambda: dgm.Bernoulli((1, 2, 3), learned=True)),
    "bernoulli-given-label": Case(lambda: dgm.Bernoulli(3, _mlp((), 3, num_classes=4))),
    "categorical": Case(lambda: dgm.Categorical((), 5, learned=True)),
    "categorical-image": Case(lambda: dgm.Categorical((1, 2, 2), 4, learned=True)),
    "categorical-given-image": Case(lambda: dgm.Categorical(2, 3, _mlp((1, 2, 2), 6))),
    "mixture": Case(lambda: dgm.MixtureOfNormals(2, 3, learned=True)),
    "mixture-one-component": Case(lambda: dgm.MixtureOfNormals(2, 1, learned=True)),
    "mixture-given-vector": Case(lambda: dgm.MixtureOfNormals(2, 2, _mlp((2,), 12))),
    "logistic": Case(lambda: dgm.DiscretizedLogistic(2, 17, learned=True)),
    "logistic-binary": Case(lambda: dgm.DiscretizedLogistic(3, 2, components=1, learned=True)),
    "logistic-bytes": Case(lambda: dgm.DiscretizedLogistic(2, 256, 3, learned=True)),
    "logistic-given-label": Case(lambda: dgm.DiscretizedLogistic((1, 2, 1), 8, 2, _mlp((), 12, num_classes=3))),
    "counts": Case(lambda: dgm.Poisson(2, learned=True), data=lambda size: counts(size, 2)),
    "counts-given-vector": Case(lambda: dgm.Poisson(2, _mlp((3,), 2)), data=lambda size: counts(size, 2)),
    "negative-binomial": Case(lambda: dgm.NegativeBinomial(2, _mlp((3,), 4)), data=lambda size: counts(size, 2)),
    "zero-inflated": Case(lambda: dgm.ZeroInflated(dgm.Poisson(2), learned=True), data=lambda size: counts(size, 2)),
    "zero-inflated-given-vector": Case(
        lambda: dgm.ZeroInflated(dgm.NegativeBinomial(2), _mlp((3,), 6)), data=lambda size: counts(size, 2)
    ),
    "student-t": Case(lambda: dgm.StudentT(2, _mlp((3,), 6))),
    "log-normal": Case(lambda: dgm.LogNormal(4, learned=True), data=lambda size: torch.randn(size, 4).exp()),
    "beta": Case(lambda: dgm.Beta(4, _mlp((3,), 8)), data=lambda size: torch.rand(size, 4).clamp(0.01, 0.99)),
    # Columns
    "columns": Case(lambda: table(learned=True), data=rows),
    "columns-given-vector": Case(lambda: table(_mlp((2,), 45)), data=rows),
    "columns-vae": Case(
        lambda: dgm.VAE(
            dgm.Normal(2),
            table(_mlp((2,), 45)),
            dgm.Normal(2, ColumnReader([None, None, None, None, 3], [1, 2], network=_mlp((7,), 4))),
        ),
        data=rows,
    ),
    "columns-made": Case(
        lambda: dgm.Autoregressive(
            table(ColumnMADE(ColumnReader([None, None, None, None, 3], [1, 2]), 9, (8,), order=(4, 0, 1, 2, 3)))
        ),
        data=rows,
    ),
    "columns-any-order": Case(
        lambda: dgm.AnyOrder(
            table(ObservedInput(5, _mlp((12,), 45), reader=ColumnReader([None, None, None, None, 3], [1, 2])))
        ),
        data=rows,
    ),
    # Variational autoencoders: every part swapped in turn
    "vae": Case(lambda: vae(dgm.Normal(2))),
    "vae-linear": Case(lambda: dgm.VAE(dgm.Normal(1), dgm.Normal(2, nn.Linear(1, 4)), dgm.Normal(1, nn.Linear(2, 2)))),
    "vae-learned-prior": Case(lambda: vae(dgm.Normal(2, learned=True))),
    "vae-mixture-prior": Case(lambda: vae(dgm.MixtureOfNormals(2, 3, learned=True))),
    "vae-bernoulli": Case(
        lambda: dgm.VAE(dgm.Normal(2), dgm.Bernoulli(4, nn.Linear(2, 4)), dgm.Normal(2, _mlp((4,), 4, levels=2)))
    ),
    "vae-counts": Case(
        lambda: dgm.VAE(dgm.Normal(2), dgm.Poisson(3, _mlp((2,), 3)), dgm.Normal(2, _mlp((3,), 4))),
        data=lambda size: counts(size, 3),
    ),
    "vae-logistic": Case(
        lambda: dgm.VAE(
            dgm.Normal(2),
            dgm.DiscretizedLogistic((1, 2, 1), 5, 2, _mlp((2,), 12)),
            dgm.Normal(2, _mlp((1, 2, 1), 4, levels=5)),
        )
    ),
    "vae-image-latent": Case(
        lambda: dgm.VAE(dgm.Normal((1, 2, 2)), dgm.Normal(3, _mlp((1, 2, 2), 6)), dgm.Normal((1, 2, 2), _mlp((3,), 8)))
    ),
    "vae-bit-latent": Case(
        lambda: dgm.VAE(dgm.Bernoulli(3, learned=True), dgm.Normal(2, _mlp((3,), 4)), dgm.Bernoulli(3, _mlp((2,), 3)))
    ),
    "vae-categorical-latent": Case(
        lambda: dgm.VAE(
            dgm.Categorical((), 3, learned=True),
            dgm.Normal(2, _mlp((), 4, num_classes=3)),
            dgm.Categorical((), 3, _mlp((2,), 3)),
        )
    ),
    "vae-given-label": Case(lambda: vae(dgm.Normal(2), num_classes=3)),
    "vae-given-vector": Case(lambda: vae(dgm.Normal(2, _mlp((3,), 4)), given_shape=(3,))),
    "vae-conditional-prior": Case(lambda: vae(dgm.Normal(2, nn.Embedding(3, 4)))),
    "vae-two-levels": Case(lambda: vae(vae(dgm.Normal(1), size=1, latent_name="z2"))),
    "vae-three-levels": Case(lambda: vae(vae(vae(dgm.Normal(2), latent_name="z3"), latent_name="z2"))),
    "vae-in-likelihood": Case(
        lambda: dgm.VAE(
            dgm.Normal(2),
            dgm.VAE(
                dgm.Normal(1, nn.Linear(2, 2)),
                dgm.Normal(2, _mlp((1,), 4, given_shape=(2,))),
                dgm.Normal(1, _mlp((2,), 2, given_shape=(2,))),
                latent_name="u",
            ),
            dgm.Normal(2, nn.Linear(2, 4)),
        )
    ),
    "vae-foreign-network": Case(
        lambda: dgm.VAE(dgm.Normal(2), dgm.Categorical(3, 4, nn.Linear(2, 12)), dgm.Normal(2, _Squash(3, 4)))
    ),
    # Priors
    "mixture-prior": Case(lambda: priors.MixturePrior(2, 3)),
    "mixture-prior-image": Case(lambda: priors.MixturePrior((1, 2, 1), 2)),
    "vae-vector-mixture-prior": Case(lambda: vae(priors.MixturePrior(2, 3))),
    "vamp-prior": Case(lambda: priors.VampPrior(dgm.Normal(2, _mlp((3,), 4)), torch.randn(4, 3))),
    "vae-vamp-prior": Case(lambda: vamp()),
    "vae-vamp-prior-integers": Case(lambda: vamp(levels=5)),
    "deep-vae": Case(
        lambda: hierarchy.vdvae(
            dgm.Categorical((1, 4, 4), 3, networks.ConvNet((2, 2, 2), (1, 4, 4), 3, 2)), (1, 1), latent_channels=1
        )
    ),
    # Guides
    "fullrank": Case(lambda: guides.FullRankNormal(2, learned=True)),
    "fullrank-given-vector": Case(lambda: guides.FullRankNormal(3, _mlp((2,), 12))),
    "lowrank": Case(lambda: guides.LowRankNormal(3, 1, learned=True)),
    "planar-given-image": Case(lambda: guides.planar(2, layers=2, hidden=(4, 6), given_shape=(1, 2, 2))),
    "sylvester-given-vector": Case(lambda: guides.sylvester(3, layers=1, reflections=2, hidden=(6,), given_shape=(3,))),
    "flow-planar": Case(lambda: dgm.Flow(2, [networks.Planar(2), networks.Sylvester(2, 1)])),
    "vae-fullrank-encoder": Case(lambda: guided(lambda p, q: guides.FullRankNormal(2, _mlp((3,), 6)))),
    "vae-lowrank-encoder": Case(lambda: guided(lambda p, q: guides.LowRankNormal(2, 1, _mlp((3,), 6)))),
    "vae-planar-encoder": Case(lambda: guided(lambda p, q: guides.planar(2, layers=2, hidden=(6,), given_shape=(3,)))),
    "vae-sylvester-encoder": Case(
        lambda: guided(lambda p, q: guides.sylvester(2, layers=1, hidden=(6,), given_shape=(3,), reflections=1))
    ),
    "vae-ladder": Case(lambda: ladder(2)),
    "vae-ladder-three-levels": Case(lambda: ladder(3)),
    "vae-semi-amortized": Case(
        lambda: guided(lambda p, q: guides.SemiAmortized(dgm.Normal(2, _mlp((3,), 4)), p, q, gradient_steps=2, lr=0.05))
    ),
    "vae-exact-linear": Case(
        lambda: guided(guides.LinearGaussianPosterior, likelihood=dgm.Normal(3, nn.Linear(2, 3), scale_type="shared"))
    ),
    "vae-exact-bits": Case(
        lambda: guided(guides.EnumeratedPosterior, dgm.Bernoulli(2, learned=True), dgm.Bernoulli(3, _mlp((2,), 3)))
    ),
    "vae-exact-class": Case(
        lambda: guided(
            guides.EnumeratedPosterior,
            dgm.Categorical((), 3, learned=True),
            dgm.Normal(3, _mlp((), 6, num_classes=3)),
        )
    ),
    "normal-given-vector-shared-scale": Case(lambda: dgm.Normal((1, 2, 2), _mlp((2,), 4), scale_type="shared")),
    # Autoregressive models
    "made": Case(lambda: made(dgm.Bernoulli, 4)),
    "made-order": Case(lambda: made(dgm.Bernoulli, (1, 2, 2), order=(2, 0, 3, 1), residual=True, hidden=(6, 6))),
    "made-one-feature": Case(
        lambda: made(dgm.Categorical, 1, levels=4),
        inert=("factors.network.first.weight", "factors.network.direct.weight"),  # no feature comes before it
    ),
    "made-categorical": Case(lambda: made(dgm.Categorical, 3, levels=4)),
    "made-normal": Case(lambda: made(dgm.Normal, 2)),
    "made-mixture": Case(lambda: made(dgm.MixtureOfNormals, 2, components=2)),
    "made-logistic": Case(lambda: made(dgm.DiscretizedLogistic, 2, levels=6, components=2)),
    "made-given-label": Case(lambda: made(dgm.Categorical, 2, levels=3, num_classes=3)),
    "made-given-vector": Case(lambda: made(dgm.MixtureOfNormals, 2, components=2, given_shape=(3,))),
    "pixelcnn": Case(lambda: pixelcnn(2)),
    "pixelcnn-predictors": Case(lambda: predicted(1)),
    "pixelcnn-predictors-color-given": Case(lambda: predicted(3, given_shape=(2,))),
    "pixelcnn-given-label": Case(lambda: pixelcnn(3, num_classes=4)),
    "transformer": Case(lambda: transformer(dgm.Bernoulli, 4, order=(2, 0, 3, 1))),
    "transformer-mixture": Case(lambda: transformer(dgm.MixtureOfNormals, 2, components=2, given_shape=(3,))),
    "transformer-given-label": Case(lambda: transformer(dgm.Categorical, (1, 2, 2), levels=3, num_classes=4)),
    "any-order": Case(lambda: any_order(dgm.Bernoulli, 3)),
    "any-order-mixture": Case(lambda: any_order(dgm.MixtureOfNormals, 2, components=2, given_shape=(3,))),
    "any-order-given-label": Case(lambda: any_order(dgm.Categorical, (1, 2, 1), levels=3, num_classes=3)),
    "any-order-in-one": Case(lambda: any_order(dgm.Bernoulli, 4).in_order((2, 0, 3, 1))),
    # Flows
    "realnvp": Case(lambda: flow.realnvp(2, layers=2, hidden=(6,))),
    "realnvp-image": Case(lambda: flow.realnvp((1, 2, 2), layers=2, hidden=(6,))),
    "realnvp-given-label": Case(lambda: flow.realnvp(2, layers=2, hidden=(6,), num_classes=3)),
    "maf": Case(lambda: flow.maf(3, layers=2, hidden=(6,)), jitter=0.05),
    "maf-one-feature": Case(
        lambda: flow.maf(1, layers=1, hidden=(4,)),
        inert=("parts.0.network.first.weight", "parts.0.network.direct.weight"),  # likewise
    ),
    "iaf-given-vector": Case(lambda: flow.iaf(2, layers=2, hidden=(6,), given_shape=(3,))),
    "nsf": Case(lambda: flow.nsf(2, layers=2, hidden=(6,), bins=4)),
    "nsf-given-image": Case(lambda: flow.nsf_autoregressive(2, layers=1, hidden=(6,), bins=3, given_shape=(1, 2, 2))),
    "flow-linear": Case(
        lambda: dgm.Flow(
            3, [networks.ActNorm(3), networks.LULinear(3), networks.Permutation((2, 0, 1))], dgm.Normal(3, learned=True)
        )
    ),
    "flow-mixture-base": Case(
        lambda: dgm.Flow(1, [networks.Elementwise(1, networks.Affine())], dgm.MixtureOfNormals(1, 2, learned=True))
    ),
    "multiscale": Case(
        lambda: multiscale.convolutional_realnvp((1, 4, 4), scales=2, layers=2, width=2, num_classes=3), jitter=0.1
    ),
    "glow": Case(lambda: multiscale.glow((2, 2, 4), layers=2, width=2), jitter=0.1),
    "flow++": Case(
        lambda: dgm.Dequantized(
            multiscale.flow_plus_plus((1, 2, 2), layers=1, width=2, components=2, given_shape=(3,), unit_cube=True),
            levels=3,
            guide=multiscale.convolutional_dequantizer((1, 2, 2), 3, width=2),
        ),
        jitter=0.1,
        certain=True,
    ),
    "dequantized": Case(
        lambda: dgm.Dequantized(flow.realnvp(2, layers=2, hidden=(6,), unit_cube=True), levels=4), certain=True
    ),
    "dequantized-variational": Case(
        lambda: dgm.Dequantized(
            flow.maf(2, layers=2, hidden=(6,), unit_cube=True),
            levels=3,
            guide=flow.realnvp(2, layers=1, hidden=(6,), given_shape=(2,), given_levels=3, unit_cube=True),
        ),
        certain=True,
    ),
    "dequantized-given-label": Case(
        lambda: dgm.Dequantized(flow.nsf(2, layers=1, hidden=(6,), bins=3, num_classes=3, unit_cube=True), levels=5),
        certain=True,
    ),
    "dequantized-bytes": Case(
        lambda: dgm.Dequantized(flow.nsf(2, layers=1, hidden=(6,), bins=3, unit_cube=True), levels=256), certain=True
    ),
    "vae-flow-prior": Case(lambda: vae(flow.nsf(2, layers=2, hidden=(6,), bins=4))),
    "vae-autoregressive-prior": Case(lambda: vae(made(dgm.MixtureOfNormals, 2, components=2))),
    "vae-discrete-autoregressive-prior": Case(
        lambda: dgm.VAE(
            made(dgm.Categorical, 2, levels=3),
            dgm.Normal(2, _mlp((2,), 4, levels=3)),
            dgm.Categorical(2, 3, _mlp((2,), 6)),
        )
    ),
    "vae-flow-encoder": Case(
        lambda: dgm.VAE(
            dgm.Normal(2), dgm.Normal(3, _mlp((2,), 6)), flow.iaf(2, layers=2, hidden=(6,), given_shape=(3,))
        )
    ),
    "onehot": Case(lambda: dgm.OneHot(dgm.Categorical(2, 3, learned=True)), data=lambda size: one_hot(size, 2, 3)),
    "onehot-given-vector": Case(
        lambda: dgm.OneHot(dgm.Categorical(2, 3, _mlp((2,), 6))), data=lambda size: one_hot(size, 2, 3)
    ),
    "onehot-autoregressive": Case(
        lambda: dgm.OneHot(transformer(dgm.Categorical, 3, levels=4)), data=lambda size: one_hot(size, 3, 4)
    ),
    "vae-codes": Case(lambda: codes(dgm.Categorical(2, 3, learned=True))),
    "vae-codes-autoregressive": Case(lambda: codes(transformer(dgm.Categorical, 2, levels=3, order=(1, 0)))),
    "vae-quantized": Case(lambda: quantized()),
    "vae-quantized-given-label": Case(lambda: quantized(given_label=True)),
    "pixelvae": Case(
        lambda: dgm.VAE(dgm.Normal(2), pixelcnn(3, given_shape=(2,)), dgm.Normal(2, _mlp((1, 2, 2), 4, levels=3)))
    ),
    "pixelvae-maps": Case(lambda: dgm.VAE(dgm.Normal(2), of_maps(), dgm.Normal(2, _mlp((1, 2, 2), 4, levels=3)))),
    "vae-dequantized-likelihood": Case(
        lambda: dgm.VAE(
            dgm.Normal(2),
            dgm.Dequantized(flow.maf(2, layers=1, hidden=(6,), given_shape=(2,), unit_cube=True), levels=3),
            dgm.Normal(2, _mlp((2,), 4, levels=3)),
        ),
        certain=True,
    ),
    # Diffusions
    "diffusion": Case(lambda: diffusion(2)),
    "diffusion-one-step": Case(lambda: diffusion(2, num_steps=1)),
    "diffusion-all-times": Case(lambda: diffusion(2, subsample=4)),
    "diffusion-importance": Case(lambda: diffusion(2, importance=True)),
    "diffusion-linear": Case(lambda: diffusion(2, noise_schedule="linear", num_steps=6, subsample=2)),
    "diffusion-noise": Case(lambda: diffusion(2, noise_schedule=dgm.Schedule([0.9, 0.6, 0.3]), predict="noise")),
    "diffusion-edm": Case(lambda: diffusion(2, predict="edm", sigma_data=0.8)),
    "diffusion-x0": Case(lambda: diffusion((1, 2, 1), predict="x0")),
    "diffusion-integers": Case(lambda: diffusion(2, levels=5)),
    "diffusion-bytes": Case(lambda: diffusion(2, levels=256)),
    "diffusion-levels": Case(
        lambda: dgm.Diffusion(
            2,
            DenoisingMLP((2,), (8, 8), num_parameters=4),
            "log-snr",
            num_steps=4,
            predict="levels",
            levels=4,
            subsample=2,
        )
    ),
    "diffusion-given-label": Case(lambda: diffusion(2, num_classes=3)),
    "diffusion-given-vector": Case(lambda: diffusion(2, given_shape=(3,))),
    "diffusion-unet": Case(
        lambda: dgm.Diffusion((1, 4, 4), DenoisingUNet((1, 4, 4), (8, 16), num_classes=3), num_steps=3, levels=4)
    ),
    "diffusion-dit": Case(
        lambda: dgm.Diffusion(
            (1, 4, 4), DenoisingTransformer((1, 4, 4), 2, 8, 2, 2, num_classes=3), num_steps=3, levels=4, predict="edm"
        )
    ),
    "continuous-diffusion": Case(lambda: continuous(2)),
    # The density of times is no part of the chain, which is what log_weights scores.
    "continuous-diffusion-learned": Case(
        lambda: continuous(2, learned=True),
        inert=("noise_schedule.centers", "noise_schedule.raw_steepness", "noise_schedule.raw_heights"),
    ),
    "continuous-diffusion-integers": Case(lambda: continuous((1, 2, 1), levels=5, predict="edm")),
    "continuous-diffusion-levels": Case(
        lambda: dgm.ContinuousDiffusion(
            2,
            DenoisingMLP((2,), (6,), num_parameters=4),
            dgm.LogSNR(0.6, -0.6),
            num_steps=10,
            levels=4,
            predict="levels",
        )
    ),
    "continuous-diffusion-given-label": Case(lambda: continuous(2, num_classes=3)),
    "vae-diffusion-prior": Case(lambda: vae(diffusion(2))),
    "vae-continuous-diffusion-prior": Case(lambda: vae(continuous(2))),
    # In other units
    "standardized-normal": Case(lambda: standardized(dgm.Normal(2, learned=True))),
    "standardized-image": Case(
        lambda: dgm.Standardized(made(dgm.Normal, (1, 2, 1)), shift=torch.tensor([[[0.5]]]), scale=2.0)
    ),
    "standardized-made": Case(lambda: standardized(made(dgm.MixtureOfNormals, 2, components=2))),
    "standardized-any-order": Case(lambda: standardized(any_order(dgm.Normal, 2))),
    "standardized-flow": Case(lambda: standardized(flow.nsf(2, layers=2, hidden=(6,), bins=4))),
    "standardized-cube": Case(
        lambda: dgm.Standardized(
            flow.realnvp(4, layers=1, hidden=(6,), unit_cube=True), shift=-4.0, scale=[1.0, 2.0, 3.0, 4.0]
        ),
        data=lambda size: torch.arange(1, 5) * torch.rand(size, 4) - 4,
    ),
    "standardized-vae": Case(lambda: standardized(vae(dgm.Normal(2)))),
    "standardized-diffusion": Case(lambda: standardized(diffusion(2))),
    "standardized-continuous-diffusion": Case(lambda: standardized(continuous(2))),
    "standardized-given-label": Case(lambda: standardized(flow.maf(2, layers=1, hidden=(6,), num_classes=3))),
    "standardized-given-vector": Case(
        lambda: dgm.Standardized(
            vae(dgm.Normal(2, _mlp((3,), 4)), given_shape=(3,)),
            shift=[0.5, -1.0],
            scale=[0.7, 1.6],
            given_shift=[0.1, 0.2, -0.3],
            given_scale=0.8,
        )
    ),
    "standardized-given-alone": Case(
        lambda: dgm.Standardized(dgm.Categorical(2, 3, _mlp((2,), 6)), given_shift=0.3, given_scale=[2.0, 0.5])
    ),
    "standardized-twice": Case(lambda: dgm.Standardized(standardized(vae(dgm.Normal(2))), shift=1.0, scale=1.2)),
    "vae-standardized-likelihood": Case(
        lambda: dgm.VAE(
            standardized(dgm.Normal(2, learned=True)),
            standardized(dgm.Normal(2, _mlp((2,), 4))),
            dgm.Normal(2, _mlp((2,), 4)),
        )
    ),
    "labeled-standardized": Case(
        lambda: dgm.Labeled(dgm.Categorical((), 3, learned=True), standardized(dgm.Normal(2, nn.Embedding(3, 4))))
    ),
    # Classifiers
    "labeled": Case(lambda: dgm.Labeled(dgm.Categorical((), 3, learned=True), dgm.Normal(2, nn.Embedding(3, 4)))),
    "labeled-integers": Case(
        lambda: dgm.Labeled(dgm.Categorical((), 3), dgm.Categorical(2, 4, _mlp((), 8, num_classes=3)))
    ),
    "labeled-made": Case(
        lambda: dgm.Labeled(dgm.Categorical((), 3, learned=True), made(dgm.Bernoulli, 3, num_classes=3))
    ),
    "labeled-any-order": Case(lambda: dgm.Labeled(dgm.Categorical((), 3), any_order(dgm.Bernoulli, 3, num_classes=3))),
    "labeled-flow": Case(
        lambda: dgm.Labeled(dgm.Categorical((), 3), flow.realnvp(2, layers=1, hidden=(6,), num_classes=3))
    ),
    "labeled-dequantized": Case(
        lambda: dgm.Labeled(
            dgm.Categorical((), 3),
            dgm.Dequantized(flow.realnvp(2, layers=1, hidden=(6,), num_classes=3, unit_cube=True), levels=4),
        ),
        certain=True,
    ),
    "vae-labeled-prior": Case(  # clusters: a mixture of Normals as p(z)
        lambda: vae(dgm.Labeled(dgm.Categorical((), 3, learned=True), dgm.Normal(2, nn.Embedding(3, 4))))
    ),
    "labeled-vae": Case(
        lambda: dgm.Labeled(dgm.Categorical((), 3, learned=True), vae(dgm.Normal(2), num_classes=3)),
        inert=("prior",),  # its guide is p(y) itself, so that only labels can teach it
    ),
    "labeled-continuous-diffusion": Case(lambda: dgm.Labeled(dgm.Categorical((), 3), continuous(2, num_classes=3))),
    "labeled-diffusion": Case(lambda: dgm.Labeled(dgm.Categorical((), 3), diffusion(2, num_classes=3))),
    "labeled-classifier": Case(
        lambda: dgm.Labeled(
            dgm.Categorical((), 3), vae(dgm.Normal(2), num_classes=3), dgm.Categorical((), 3, _mlp((2,), 3))
        )
    ),
    "discriminative": Case(lambda: dgm.Discriminative(dgm.Categorical((), 3, _mlp((2,), 3)))),
}


# Between them they have every class of module, and every kind of what is given: for tests of what each statement does.
EVERY_PART = {
    *("normal-given-pair", "logistic", "zero-inflated", "student-t", "columns-made", "vae-foreign-network"),
    *("mixture-prior", "vamp-prior", "deep-vae", "lowrank", "planar-given-image", "flow-planar"),
    *("vae-fullrank-encoder", "vae-ladder", "vae-semi-amortized", "vae-exact-linear", "vae-exact-bits", "made-order"),
    *("nsf-given-image", "iaf-given-vector", "flow-linear", "flow++", "dequantized", "onehot", "vae-quantized"),
    *("pixelvae", "diffusion-noise", "diffusion-x0", "diffusion-levels", "diffusion-unet", "diffusion-dit"),
    *("continuous-diffusion-integers", "continuous-diffusion-levels", "standardized-continuous-diffusion"),
    *("standardized-given-alone", "labeled-made", "discriminative", "any-order", "any-order-in-one"),
    *("pixelcnn-predictors-color-given", "pixelvae-maps"),
}


def once_per_part(names, *also):
    """The names as parameters of a test; those outside of `EVERY_PART`, and those in ``also``, only every night."""
    daily = EVERY_PART.difference(also)
    return [pytest.param(name, marks=() if name in daily else pytest.mark.nightly) for name in names]


def parts_of(name):
    """The classes of a program's modules, and the kind of what it is given."""
    case = CASES[name]
    program = case.build()
    _, given = case.draw(program, 3)
    leaf = given[0] if isinstance(given, tuple) else given
    kind = None if leaf is None else (isinstance(given, tuple), leaf.is_floating_point(), min(leaf.dim(), 3))
    return {kind, *(type(module).__name__ for module in program.modules())}


def data_for(case, program, size=24):
    """A `Data` for a case; None where x is a scalar, or where given is no label, so that no `Data` carries it."""
    x, given = case.draw(program, size)
    if program.variable == "y":
        return dgm.Data(given, x.long(), num_classes=program.levels)
    labeled = given is not None and not isinstance(given, tuple) and given.dim() == 1 and not given.is_floating_point()
    if (given is not None and not labeled) or program.event_shape == ():
        return None
    return dgm.Data(x, given, levels=program.levels, num_classes=program.num_classes if labeled else None)
