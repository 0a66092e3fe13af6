"""Names to programs, sized for the data: ``dgm.build("vae", data, prior="flow")``.

Every name stands for a composition that can be written out in a few lines; `build` chooses sizes that suit small images
and points in the plane. A swap may be a name or an object.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dgm_pyro.autoregressive import Autoregressive
from dgm_pyro.conditionals import Bernoulli, Categorical, DiscretizedLogistic, MixtureOfNormals, Normal, Parametric
from dgm_pyro.data import Data
from dgm_pyro.diffusion import Diffusion
from dgm_pyro.flow import Dequantized, Flow, dequantizer, iaf, maf, nsf, nsf_autoregressive, realnvp
from dgm_pyro.labelled import Discriminative, Labelled
from dgm_pyro.networks import MADE, MLP, DenoisingMLP, DenoisingUNet, PixelCNN
from dgm_pyro.program import Program, check_count, is_pair
from dgm_pyro.vae import VAE

LATENT = 16
Table = dict[str, tuple[Callable[..., Program], str]]


def is_image(data: Data) -> bool:
    return len(data.event_shape) == 3


def features_of(data: Data, network: Callable[[int], nn.Module | None], **options: Any) -> Parametric:
    """The conditional that suits the data: Bernoulli for bits, discretized logistics for levels, else Normals.

    Args:
        network: makes the network for a number of parameters per feature.
    """
    shape, levels = data.event_shape, data.levels
    if levels is None:
        return MixtureOfNormals(shape, 10, network(30), **options)
    if levels == 2:
        return Bernoulli(shape, network(1), **options)
    return DiscretizedLogistic(shape, levels, 5, network(15), **options)


# -- models ---------------------------------------------------------------------------------------------------------


def pixels(data: Data, num_classes: int | None) -> Program:
    if data.levels is not None:
        values = data.levels
        if num_classes is None:
            return Categorical(data.event_shape, values, learned=True)
        return Categorical(data.event_shape, values, nn.Embedding(num_classes, values * data.event_shape.numel()))
    if num_classes is None:
        return features_of(data, lambda p: None, learned=True)
    return features_of(data, lambda p: nn.Embedding(num_classes, p * data.event_shape.numel()))


def made(data: Data, num_classes: int | None) -> Program:
    return Autoregressive(
        features_of(
            data,
            lambda p: MADE(
                data.event_shape,
                p,
                (256, 256, 256),
                residual=True,
                dropout=0.2 if is_image(data) else 0.0,
                levels=data.levels,
                num_classes=num_classes,
            ),
        )
    )


def pixelcnn(data: Data, num_classes: int | None) -> Program:
    if not is_image(data):
        raise ValueError(f"pixelcnn needs images (1, H, W), but {data.name} has event_shape {tuple(data.event_shape)}")
    return Autoregressive(
        features_of(
            data, lambda p: PixelCNN(data.event_shape, p, levels=data.levels, num_classes=num_classes, dropout=0.1)
        )
    )


def _flow(stack: Callable[..., Flow]) -> Callable[[Data, int | None], Program]:
    def build_flow(data: Data, num_classes: int | None) -> Program:
        if data.levels is None:
            return stack(data.event_shape, num_classes=num_classes)
        flow = stack(data.event_shape, num_classes=num_classes, unit=True)
        return Dequantized(flow, data.levels, guide=dequantizer(data.event_shape, data.levels))

    return build_flow


def diffusion(data: Data, num_classes: int | None) -> Program:
    predict, outputs = ("v", 1) if data.levels is None or data.levels > 32 else ("levels", data.levels)
    hidden = 0.1 if num_classes is not None else 0.0
    denoiser: nn.Module
    if is_image(data):
        denoiser = DenoisingUNet(data.event_shape, (32, 64), num_classes=num_classes, outputs=outputs)
    else:
        denoiser = DenoisingMLP(data.event_shape, num_classes=num_classes, outputs=outputs)
    return Diffusion(
        data.event_shape,
        denoiser,
        "cosine" if data.levels is None else "log-snr",
        steps=50,
        predict=predict,
        levels=data.levels,
        subsample=2,
        label_dropout=hidden,
    )


def vae(
    data: Data,
    num_classes: int | None,
    *,
    prior: Program | str = "normal",
    encoder: Program | str = "normal",
    likelihood: Program | str = "independent",
    latent: int | None = None,
) -> Program:
    latent = (LATENT if is_image(data) else 2) if latent is None else check_count(latent, "latent")
    return VAE(
        prior=_named(prior, PRIORS, "prior", (latent,)),
        likelihood=_named(likelihood, LIKELIHOODS, "likelihood", data, latent, num_classes),
        encoder=_named(encoder, ENCODERS, "encoder", data, latent, num_classes),
    )


def _named(choice: Program | str, table: Table, role: str, *args: Any) -> Program:
    if isinstance(choice, Program):
        return choice
    if choice not in table:
        raise ValueError(f"{role} must be a Program or one of {', '.join(table)}, got {choice!r}")
    return table[choice][0](*args)


def _two_level(shape: tuple[int]) -> Program:
    size, top = shape[0], max(1, shape[0] // 2)
    return VAE(
        prior=Normal(top),
        likelihood=Normal(size, MLP((top,), 2 * size, (64, 64))),
        encoder=Normal(top, MLP((size,), 2 * top, (64, 64))),
        latent="z2",
    )


PRIORS: Table = {
    "normal": (lambda shape: Normal(shape), "N(0, I)"),
    "flow": (lambda shape: realnvp(shape, layers=6, hidden=(64, 64)), "a RealNVP flow"),
    "made": (
        lambda shape: Autoregressive(MixtureOfNormals(shape, 5, MADE(shape, 15, (64, 64)))),
        "autoregressive mixtures of Normals",
    ),
    "diffusion": (
        lambda shape: Diffusion(shape, DenoisingMLP(shape, (64, 64, 64)), steps=20),
        "a latent diffusion of 20 steps",
    ),
    "vae": (_two_level, "a VAE: a hierarchy of two levels"),
}

ENCODERS: Table = {
    "normal": (
        lambda data, latent, classes: Normal(
            latent, MLP(data.event_shape, 2 * latent, levels=data.levels, num_classes=classes)
        ),
        "a diagonal Normal (mean field)",
    ),
    "iaf": (
        lambda data, latent, classes: iaf(
            (latent,), layers=2, hidden=(64, 64), context_shape=data.event_shape, context_levels=data.levels
        ),
        "an inverse autoregressive flow",
    ),
}

LIKELIHOODS: Table = {
    "independent": (
        lambda data, latent, classes: (
            Normal(data.event_shape, MLP((latent,), 2 * data.event_shape.numel(), num_classes=classes))
            if data.levels is None
            else features_of(data, lambda p: MLP((latent,), p * data.event_shape.numel(), num_classes=classes))
        ),
        "independent features given z",
    ),
    "made": (
        lambda data, latent, classes: Autoregressive(
            features_of(
                data, lambda p: MADE(data.event_shape, p, (256, 256), levels=data.levels, context_shape=(latent,))
            )
        ),
        "autoregressive features given z (PixelVAE)",
    ),
}

MODELS: Table = {
    "pixels": (pixels, "independent features: the reference to beat"),
    "made": (made, "autoregressive, by a masked MLP"),
    "pixelcnn": (pixelcnn, "autoregressive, by gated masked convolutions (images)"),
    "realnvp": (_flow(realnvp), "flow of affine couplings; dequantized for integers"),
    "maf": (_flow(maf), "masked autoregressive flow; dequantized for integers"),
    "nsf": (_flow(nsf), "neural spline flow of couplings; dequantized for integers"),
    "nsf-autoregressive": (_flow(nsf_autoregressive), "autoregressive neural spline flow; dequantized for integers"),
    "vae": (vae, "variational autoencoder; swaps: prior, encoder, likelihood, latent"),
    "diffusion": (diffusion, "diffusion model, the bound in closed form"),
    "classifier": (
        lambda data, num_classes: Discriminative(
            Categorical((), data.num_classes, MLP(data.event_shape, data.num_classes, levels=data.levels))
        ),
        "discriminative p(y | x)",
    ),
}


def build(name: str, data: Data, *, labelled: bool = False, **swaps: Any) -> Program:
    """A program by name, sized for ``data``.

    Args:
        name: a key of `MODELS`.
        data: what it will be trained on; gives shape, levels and number of classes.
        labelled: build the generative classifier p(y) p(x | y) over the named family instead.
        swaps: for "vae": ``prior``, ``encoder``, ``likelihood`` (names or programs), ``latent`` (an int).

    Raises:
        ValueError, TypeError: an unknown name, or a swap that the model does not take.

    >>> import dgm_pyro as dgm
    >>> dgm.build("vae", dgm.data.load("digits"), prior="vae").latents("x")
    ('z', 'z2')
    """
    if name not in MODELS:
        raise ValueError(f"the model must be one of {', '.join(MODELS)}, got {name!r}")
    if not isinstance(data, Data):
        raise TypeError(f"data must be a dgm.data.Data, got {type(data).__name__}: wrap a tensor in dgm.Data(x, y)")
    if name != "vae" and swaps:
        raise ValueError(f"{name!r} takes no {', '.join(swaps)}: only 'vae' has these to swap")
    unknown = set(swaps) - {"prior", "encoder", "likelihood", "latent"}
    if unknown:
        raise ValueError(f"unknown swap {', '.join(sorted(unknown))}: 'vae' takes prior, encoder, likelihood, latent")
    classes = data.num_classes
    if classes is None and (labelled or name == "classifier"):
        raise ValueError(f"{data.name} has no labels, so no classifier can be built for it")
    make = MODELS[name][0]
    if not labelled or classes is None:
        return make(data, None, **swaps)
    if name == "classifier":
        raise ValueError("'classifier' is discriminative: labelled=True goes with a family of p(x)")
    classifier = None
    program = make(data, classes, **swaps)
    if not program.conditional or (isinstance(program, VAE) and not _generates_from_label(program)):
        raise ValueError(
            "neither the prior nor the likelihood reads the label: with labelled=True use likelihood='independent', "
            "or pass parts of your own"
        )
    if not program.tractable:
        classifier = Categorical((), classes, MLP(data.event_shape, classes, levels=data.levels))
    return Labelled(Categorical((), classes, learned=True), program, classifier)


def _generates_from_label(vae: VAE) -> bool:
    """Whether p(x | y) of a VAE depends on y; an encoder that reads y does not change it."""
    return vae.prior.conditional or is_pair(vae.likelihood.given_shape)
