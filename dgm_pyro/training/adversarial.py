r"""Objectives that compare samples with data, for programs without a density: two-player games, and kernel scores.

**A critic** V(x) is trained to tell data from samples. It succeeds the more, the further p (the data) and q (the
program) are apart. For an f-divergence, :math:`D_f(p \| q) = E_q[f(p/q)]`,

.. math::
    D_f(p \,\|\, q) \ge E_p[T(V(x))] - E_q[f^*(T(V(x)))], \qquad T(V) = f'(e^V),

for any V, with equality at :math:`V = \log p/q`. So in every game of this family the critic estimates the *log density
ratio* of two unknown densities, and the program moves its samples towards larger V. For the Jensen-Shannon divergence
this is the GAN. The Wasserstein distance is no f-divergence, but the supremum over critics with slopes of at most one:
:math:`W(p, q) = \sup_V E_p[V] - E_q[V]`.

**A kernel** k needs no second player: :math:`E\,k(x, x') + E\,k(y, y') - 2\,E\,k(x, y)` of data x and samples y is the
squared maximum mean discrepancy. It has an unbiased estimate from pairs (a U-statistic), with an unbiased gradient.
:math:`k(x, y) = -|x - y|` makes it the energy distance.

No data enter the program, and its samples are compared with them. So only ``joint`` must be differentiable, from the
parameters to x.

Source: Goodfellow et al. 2014 (arXiv 1406.2661); Nowozin, Cseke and Tomioka 2016 (arXiv 1606.00709); Gulrajani et al.
2017 (arXiv 1704.00028); Mescheder, Geiger and Nowozin 2018 (arXiv 1801.04406); Gretton et al. 2012; Sejdinovic et al.
2013 (arXiv 1207.6076).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_pyro.checks import (
    check_choice,
    check_count,
    check_counts,
    check_finite,
    check_number,
    check_tensor,
    check_type,
)
from dgm_pyro.evaluation import standard_error
from dgm_pyro.networks.convolutional import ConvEncoder
from dgm_pyro.networks.mlp import MLP, apply_network, to_unit
from dgm_pyro.networks.sizes import image_sizes, is_large
from dgm_pyro.objectives import COMPARISONS, Bound, HasFormula
from dgm_pyro.program import (
    Program,
    batch_plates,
    check_program,
    differentiating,
    hidden,
    is_pair,
    map_given,
    parameter_of,
    parts_of,
    seeded,
)

__all__ = [
    "COMPARISONS",
    "DIVERGENCES",
    "Adversarial",
    "DensityRatio",
    "KernelScore",
    "density_ratio",
    "divergence_bound",
    "draw",
    "energy",
    "f_gan",
    "gan",
    "mmd",
    "slopes",
    "squared_distance",
    "wgan_gp",
]

Term = Callable[[Tensor], Tensor]

# As functions of V = log p/q: T(V) = f'(p/q), and f*(T(V)), the convex conjugate at T(V).
DIVERGENCES: dict[str, tuple[Term, Term]] = {
    "kl": (lambda v: 1 + v, lambda v: v.exp()),
    "reverse-kl": (lambda v: -(-v).exp(), lambda v: v - 1),
    "js": (lambda v: F.logsigmoid(v) + math.log(2), lambda v: -F.logsigmoid(-v) - math.log(2)),
    "pearson": (lambda v: 2 * (v.exp() - 1), lambda v: (2 * v).exp() - 1),
    "hellinger": (lambda v: 1 - (-v / 2).exp(), lambda v: (v / 2).exp() - 1),
}
"""KL(p || q), KL(q || p), KL(p || m) + KL(q || m) with m = (p + q) / 2 (twice the Jensen-Shannon divergence),
the chi-square E_q[(p/q - 1)^2], and the squared Hellinger distance, the integral of (sqrt p - sqrt q)^2."""


def divergence_bound(divergence: str, of_p: Tensor, of_q: Tensor) -> Tensor:
    """The lower bound on a divergence from a critic's values at draws of p and of q, a scalar.

    Raises:
        ValueError: the divergence is not one of `DIVERGENCES`.
    """
    t, conjugate = DIVERGENCES[_check_divergence(divergence)]
    return t(of_p).mean() - conjugate(of_q).mean()


def _check_divergence(divergence: Any) -> str:
    check_choice(divergence, DIVERGENCES, "divergence")
    return divergence


def draw(program: Program, num_samples: int, given: Any = None) -> Tensor:
    """Samples of ``program`` with their gradient, ``(num_samples, *event_shape)``, integers scaled to [-1, 1].

    Raises:
        ValueError: the samples have no gradient although a parameter requires one: x is discrete, or a step of its
            draw has no gradient.
    """
    with hidden(), batch_plates((num_samples,)):
        x = program.joint(program.variable, None, given)
    if torch.is_grad_enabled() and not x.requires_grad:
        raise ValueError(
            f"the draws of this {type(program).__name__} carry no gradient, so comparing samples cannot train "
            "it: use a dgm.Implicit, a flow, or continuous likelihoods; or an objective such as 'elbo'"
        )
    return _to_unit_range(program, x)


def _to_unit_range(program: Program, x: Tensor) -> Tensor:
    return to_unit(x, program.levels, parameter_of(program).dtype)


# The payoffs of critic and program in LaTeX, without the penalties on the critic's slope.
GAMES = {
    "gan": r"\max_q \, E_q[\log \sigma(V)], \quad \max_V \, E_p[\log \sigma(V)] + E_q[\log \sigma(-V)]",
    "wasserstein": r"\min_q \max_V \, E_p[V] - E_q[V]",
    "kl": r"\min_q \max_V \, E_p[1 + V] - E_q[e^V]",
    "reverse-kl": r"\min_q \max_V \, E_p[-e^{-V}] - E_q[V - 1]",
    "js": r"\min_q \max_V \, E_p[\log 2 \sigma(V)] + E_q[\log 2 \sigma(-V)]",
    "pearson": r"\min_q \max_V \, E_p[2 (e^V - 1)] - E_q[e^{2V} - 1]",
    "hellinger": r"\min_q \max_V \, E_p[1 - e^{-V/2}] - E_q[e^{V/2} - 1]",
}


# -- games -------------------------------------------------------------------------------------------------------------


class Adversarial(HasFormula):
    """Adversarial training of the program against a critic, which learns in the same `dgm.fit`.

    Before each step of the program the critic takes ``critic_steps`` steps, by Adam with the program's current learning
    rate. Epochs are validated by the energy distance to the held-out data, because the loss of a player depends on the
    other player and does not measure quality.

    Args:
        game: "gan" (the critic maximizes the bound on the Jensen-Shannon divergence, the program E[log sigma(V)], the
            non-saturating form), "wasserstein", or one of `DIVERGENCES`, in which the program descends what the critic
            ascends.
        critic: maps x, ``(B, *event_shape)``, or x and ``given``, to ``(B, 1)``; it is trained in place. Without one,
            a network that suits the program is made for each training. Integers reach it scaled to [-1, 1].
        r1: weight of (1/2) E|grad V|^2 over data, which makes the game converge locally.
        gradient_penalty: weight of E(|grad V| - 1)^2 at random points between data and samples.
        critic_steps: steps of the critic before each step of the program.
        critic_lr: the critic's learning rate as a multiple of the program's.

    Attributes:
        critic: the critic of the latest training.

    Raises:
        ValueError, TypeError: an argument does not fit.

    Source: Goodfellow et al. 2014; Mescheder et al. 2018, equation 9 (R1); Gulrajani et al. 2017, equation 3;
    Nowozin et al. 2016, equations 6 and 8.
    """

    unit: ClassVar[str] = "of the game"
    eager_only: ClassVar[str] = "trains a critic together with the program"

    def __init__(
        self,
        game: str = "gan",
        critic: nn.Module | None = None,
        *,
        r1: float = 0.1,
        gradient_penalty: float = 0.0,
        critic_steps: int = 1,
        critic_lr: float = 1.0,
    ):
        check_choice(game, GAMES, "game")
        check_type(critic, nn.Module | None, "critic", "a torch.nn.Module or None")
        check_number(r1, "r1", at_least=0)
        check_number(gradient_penalty, "gradient_penalty", at_least=0)
        check_count(critic_steps, "critic_steps")
        check_number(critic_lr, "critic_lr", above=0)
        self.game, self.own, self.critic = game, critic, critic
        self.r1, self.gradient_penalty = r1, gradient_penalty
        self.critic_steps, self.critic_lr = critic_steps, critic_lr
        self.optimizer: torch.optim.Optimizer | None = None
        self.validation = KernelScore()

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={getattr(self, k)}" for k in ("r1", "gradient_penalty", "critic_steps", "critic_lr"))
        return f"Adversarial({self.game!r}, {options})"

    @property
    def formula(self) -> str:
        return GAMES[self.game]

    def prepare(self, program: Program) -> None:
        """Start a game against ``program``; `dgm.fit` calls this once."""
        like = next(program.parameters())
        self.critic = (critic_for(program) if self.own is None else self.own).to(like.device, like.dtype)
        self.optimizer = torch.optim.Adam(self.critic.parameters(), betas=(0.0, 0.99))

    def state_dict(self) -> dict[str, Any]:
        """The state of the critic and its optimizer, from which a stored game continues."""
        critic, optimizer = self._critic_and_optimizer()
        return {"critic": critic.state_dict(), "optimizer": optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a ``state`` of `state_dict`, after `prepare`."""
        check_type(state, dict, "state", "a dict from state_dict")
        critic, optimizer = self._critic_and_optimizer()
        critic.load_state_dict(state["critic"])
        optimizer.load_state_dict(state["optimizer"])

    def update(self, program: Program, x: Tensor, given: Any, lr: float) -> None:
        """The critic's steps; `dgm.fit` calls this before each step of the program, with its learning rate."""
        critic, optimizer = self._critic_and_optimizer()
        optimizer.param_groups[0]["lr"] = self.critic_lr * lr
        real = _to_unit_range(program, x)
        critic.requires_grad_(True)
        for _ in range(self.critic_steps):
            with torch.no_grad():
                fake = draw(program, len(x), given)
            loss = self.critic_loss(real, fake, given)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    def critic_loss(self, real: Tensor, fake: Tensor, given: Any = None) -> Tensor:
        """The critic's loss, a scalar: minus its estimate of the distance, plus the penalties on its slope."""
        critic = self._critic_and_optimizer()[0]
        loss = -self.distance(_critic_values(critic, real, given), _critic_values(critic, fake, given))
        if self.r1 > 0:
            loss = loss + self.r1 / 2 * slopes(critic, real, given).square().mean()
        if self.gradient_penalty > 0:
            share = torch.rand(len(real), *(1,) * (real.dim() - 1), device=real.device, dtype=real.dtype)
            between = torch.lerp(fake, real, share)
            loss = loss + self.gradient_penalty * (slopes(critic, between, given) - 1).square().mean()
        return loss

    def distance(self, of_data: Tensor, of_samples: Tensor) -> Tensor:
        """The distance between data and samples, estimated from the critic's values; a scalar."""
        if self.game == "wasserstein":
            return of_data.mean() - of_samples.mean()
        return divergence_bound("js" if self.game == "gan" else self.game, of_data, of_samples)

    def __call__(
        self, program: Program, x: Tensor, given: Any = None, observed: dict[str, Tensor] | None = None
    ) -> Bound:
        """The program's payoff per sample, with the critic's estimate of the distance as its ``kl``."""
        critic, _ = self._critic_and_optimizer()
        critic.requires_grad_(False)
        of_samples = _critic_values(critic, draw(program, len(x), given), given)
        if self.game == "gan":
            payoff = F.logsigmoid(of_samples)
        else:
            payoff = of_samples if self.game == "wasserstein" else DIVERGENCES[self.game][1](of_samples)
        with torch.no_grad():
            distance = self.distance(_critic_values(critic, _to_unit_range(program, x), given), of_samples)
        return Bound(payoff, payoff, {program.variable: payoff}, {"critic": distance.expand_as(payoff)})

    def _critic_and_optimizer(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        if self.critic is None or self.optimizer is None:
            raise ValueError("the critic is not set up: pass the objective to dgm.fit, or call prepare(program) first")
        return self.critic, self.optimizer


def _critic_values(critic: nn.Module, x: Tensor, given: Any) -> Tensor:
    """V(x), ``(B,)``."""
    value = apply_network(critic, x, *(() if given is None else parts_of(given)))
    if value.shape not in ((len(x), 1), (len(x),)):
        raise ValueError(
            f"the critic returned shape {tuple(value.shape)}, but it must return one number per datum, ({len(x)}, 1)"
        )
    return value.reshape(len(x))


@differentiating("slopes")
def slopes(critic: nn.Module, x: Tensor, given: Any = None) -> Tensor:
    """|grad V| at every x, ``(B,)``, as a differentiable tensor."""
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(_critic_values(critic, x, given).sum(), x, create_graph=True)
    return (gradient.flatten(1).square().sum(1) + 1e-12).sqrt()


def critic_for(program: Program, hidden: tuple[int, ...] = (128, 128, 128)) -> nn.Module:
    """A critic that suits the program: an MLP on points, convolutions on images of at least 16 pixels a side."""
    check_program(program)
    options: dict[str, Any] = {}
    if program.conditional:
        if program.given_shape is None or is_pair(program.given_shape):
            raise ValueError(
                "the program's given is neither a label nor a vector: pass your own Adversarial(critic=...)"
            )
        options = {"num_classes": program.num_classes}
        if program.num_classes is None:
            options = {"given_shape": tuple(program.given_shape)}
    shape = program.event_shape
    if is_large(shape):
        return ConvEncoder(shape, 1, image_sizes(shape, 1).widths, **options)
    return MLP(shape, 1, hidden, activation="silu", **options)


def gan(r1: float = 0.1) -> Adversarial:
    """The non-saturating GAN with an R1 penalty, against a critic; for programs that can only be sampled."""
    return Adversarial("gan", r1=r1)


def wgan_gp(gradient_penalty: float = 10.0) -> Adversarial:
    """The Wasserstein distance with a gradient penalty, against a critic with 5 steps per step of the program."""
    return Adversarial("wasserstein", r1=0.0, gradient_penalty=gradient_penalty, critic_steps=5)


def f_gan(divergence: str = "js") -> Adversarial:
    """An f-divergence, against a critic: kl, reverse-kl, js, pearson or hellinger."""
    return Adversarial(_check_divergence(divergence))


# -- kernel scores -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelScore(HasFormula):
    """Minus the energy distance or the squared maximum mean discrepancy between samples and data, without a critic.

    Per datum x, with samples y of the program and the other data x',

        2 mean k(x, y) - mean k(y, y') - mean k(x, x'),

    whose expectation is minus the squared distance; every mean is over distinct points, so there is no bias. In a
    conditional program each datum has ``num_samples`` samples for its own ``given``. The last term, which does not
    depend on the program, is then left out, and the score is a proper scoring rule of p(x | given).

    Args:
        kernel: "energy", -|x - y|, or "gaussian", the mean of exp(-|x - y|^2 / (2 s^2 D)) over the scales s.
        scales: scales of the Gaussian kernel, in units of x.
        num_samples: samples per datum for a conditional program, at least 2.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Source: Gretton et al. 2012, lemma 6; Gneiting and Raftery 2007, section 5; Bouchacourt et al. 2016
    (arXiv 1606.04414).
    """

    kernel: str = "energy"
    scales: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
    num_samples: int = 4
    unit: ClassVar[str] = "squared distance"
    eager_only: ClassVar[str] = "fixes the number of pairs that it compares"

    def __post_init__(self) -> None:
        check_choice(self.kernel, ("energy", "gaussian"), "kernel")
        check_type(self.scales, Sequence, "scales", "a sequence of numbers")
        if not self.scales:
            raise ValueError("scales must name at least one scale")
        for scale in self.scales:
            check_number(scale, "scales", above=0)
        check_count(self.num_samples, "num_samples")
        if self.num_samples < 2:
            raise ValueError(
                "num_samples must be at least 2, because the score compares samples of one datum, got "
                f"{self.num_samples}"
            )

    @property
    def formula(self) -> str:
        kernel = "-|x - y|" if self.kernel == "energy" else r"\mathrm{mean}_s \, e^{-|x - y|^2 / (2 s^2 D)}"
        return rf"2 \, E[k(x, y)] - E[k(y, y')] - E[k(x, x')], \quad k(x, y) = {kernel}"

    def __call__(
        self, program: Program, x: Tensor, given: Any = None, observed: dict[str, Tensor] | None = None
    ) -> Bound:
        real = _to_unit_range(program, x).flatten(1)
        if given is None:
            fake = draw(program, max(len(x), 2)).flatten(1)
            between, within = self.similarity(real, fake).mean(1), self.mean_of_pairs(fake)
            data = self.to_the_others(real) if len(real) > 1 else torch.zeros_like(between)
        else:
            k = self.num_samples
            fake = draw(program, k * len(x), map_given(lambda part: part.repeat_interleave(k, 0), given))
            fake = fake.reshape(len(x), k, -1)
            between = self.similarity(real.unsqueeze(1), fake).flatten(1).mean(1)
            within, data = self.mean_of_pairs(fake), torch.zeros_like(between)
        value = 2 * between - within - data
        return Bound(value, value, {program.variable: value})

    def similarity(self, x: Tensor, y: Tensor) -> Tensor:
        """k of every pair: ``(*batch, N, D)`` and ``(*batch, M, D)`` to ``(*batch, N, M)``."""
        # Not by products of matrices, which lose precision in the small distances that matter to a U-statistic.
        distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        if self.kernel == "energy":
            return -distance
        widths = [2 * scale**2 * x.shape[-1] for scale in self.scales]
        return sum(((-distance.square() / width).exp() for width in widths), torch.zeros_like(distance)) / len(widths)

    def to_the_others(self, x: Tensor) -> Tensor:
        """Mean of k between each point and the other points of its set, ``(*batch, N)``."""
        size, itself = x.shape[-2], 0.0 if self.kernel == "energy" else 1.0
        return (self.similarity(x, x).sum(-1) - itself) / (size - 1)

    def mean_of_pairs(self, x: Tensor) -> Tensor:
        return self.to_the_others(x).mean(-1)


@torch.no_grad()
def squared_distance(x: Tensor, y: Tensor, score: KernelScore | None = None) -> float:
    """An unbiased estimate of the squared distance of two sets of points; it may be negative.

    Args:
        x, y: ``(N, ...)`` and ``(M, ...)``, at least two points each.
        score: a `KernelScore` with the kernel; default the energy distance, 2 E|x - y| - E|x - x'| - E|y - y'|.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    check_finite(x, "x")
    check_finite(y, "y")
    score = KernelScore() if score is None else score
    check_type(score, KernelScore, "score", "a KernelScore or None")
    x, y = x.flatten(1), y.flatten(1)
    return float(score.mean_of_pairs(x) + score.mean_of_pairs(y) - 2 * score.similarity(x, y).mean())


def energy() -> KernelScore:
    """The energy distance to the data, from pairs of points, without a critic."""
    return KernelScore()


def mmd(scale: float = 1.0) -> KernelScore:
    """The squared maximum mean discrepancy with Gaussian kernels of several widths, all multiplied by ``scale``."""
    check_number(scale, "scale", above=0)
    return KernelScore("gaussian", tuple(scale * s for s in KernelScore.scales))


COMPARISONS.update({"gan": gan, "wgan-gp": wgan_gp, "f-gan": f_gan, "energy": energy, "mmd": mmd})


# -- the density ratio as a tool ---------------------------------------------------------------------------------------


@dataclass
class DensityRatio:
    """log p(x) / q(x) of two distributions that are known by samples only: call it with x, ``(B, ...)``.

    Attributes:
        critic: the network.
        divergence: the divergence whose bound trained it.
        bounds: this bound on the training samples, every hundred steps.
    """

    critic: nn.Module
    divergence: str
    bounds: list[float] = field(default_factory=list)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """log p(x) / q(x) in nats, ``(B,)``."""
        return _critic_values(self.critic, x, None)

    def kl(self, p: Tensor) -> tuple[float, float]:
        """KL(p || q) in nats, as the mean log ratio at fresh samples of p, and its standard error.

        The standard error covers the samples alone. A wrong critic makes the estimate wrong in either direction: see
        `bound` for a lower bound.
        """
        check_finite(p, "p")
        ratio = self(p).double()
        return ratio.mean().item(), standard_error(ratio)

    def bound(self, p: Tensor, q: Tensor, divergence: str | None = None) -> tuple[float, float]:
        """A lower bound on a divergence from fresh samples of both, which holds in expectation for any critic.

        Returns:
            The estimate, and its standard error.
        """
        check_finite(p, "p")
        check_finite(q, "q")
        t, conjugate = DIVERGENCES[_check_divergence(self.divergence if divergence is None else divergence)]
        of_p, of_q = t(self(p).double()), conjugate(self(q).double())
        return (of_p.mean() - of_q.mean()).item(), math.hypot(standard_error(of_p), standard_error(of_q))


@differentiating("density_ratio")
def density_ratio(
    p: Tensor,
    q: Tensor,
    critic: nn.Module | None = None,
    *,
    divergence: str = "js",
    gradient_steps: int = 2000,
    batch_size: int = 256,
    lr: float = 2e-3,
    seed: int = 0,
) -> DensityRatio:
    """Learn log p/q from samples of both, by maximizing a lower bound on a divergence.

    The divergence "js" is logistic regression of whether x comes from p or from q, the most robust choice. "kl"
    estimates E_p[log p/q] itself, with the variance of E_q[p/q].

    Args:
        p, q: samples, ``(N, ...)`` and ``(M, ...)``.
        critic: maps x to ``(B, 1)``; default an MLP with initial weights from ``seed``.
        divergence: one of `DIVERGENCES`.
        gradient_steps, batch_size, lr: options of Adam; the rate falls to zero along a cosine.
        seed: seed of all draws; the global random state does not change.

    Raises:
        ValueError: shapes differ, or the divergence is unknown.

    >>> import torch, dgm_pyro as dgm
    >>> ratio = dgm.adversarial.density_ratio(torch.randn(100, 2), torch.randn(100, 2), gradient_steps=10)
    >>> ratio(torch.zeros(5, 2)).shape
    torch.Size([5])
    """
    _check_divergence(divergence)
    check_counts(gradient_steps=gradient_steps, batch_size=batch_size)
    check_number(lr, "lr", above=0)
    check_type(critic, nn.Module | None, "critic", "a torch.nn.Module or None")
    check_finite(p, "p")
    check_finite(q, "q")
    check_tensor(q, p.shape[1:], "q", "the shape of one p")
    with seeded(seed, p.device):
        chosen = MLP(p.shape[1:], 1, (64, 64), activation="silu").to(p) if critic is None else critic
        optimizer = torch.optim.Adam(chosen.parameters(), lr=lr)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, gradient_steps)
        # Summed on the device, because reading a number at every step would wait for the device.
        bounds, total = [], torch.zeros((), dtype=torch.float64, device=p.device)
        for step in range(1, gradient_steps + 1):
            batches = [x[torch.randint(len(x), (batch_size,), device=x.device)] for x in (p, q)]
            bound = divergence_bound(divergence, *(_critic_values(chosen, x, None) for x in batches))
            optimizer.zero_grad(set_to_none=True)
            (-bound).backward()
            optimizer.step()
            falling.step()
            total += bound.detach()
            if step % 100 == 0:
                bounds.append(total.item() / 100)
                total.zero_()
    chosen.eval()
    return DensityRatio(chosen, divergence, bounds)
