"""A script as a user writes it: mypy reads it in `make check`, as strictly as it can, pyright in `make pyright`;
pytest runs it.

A comment that ignores an error is an error where there is none: mypy says so, and so it must see these mistakes.
"""

import inspect
import typing
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dgm_pyro as dgm
from dgm_pyro import catalog
from dgm_pyro.networks import MLP


def test_a_users_script_is_typed(tmp_path: Path) -> None:
    prior: dgm.Flow = dgm.flow.realnvp(2)
    vae = dgm.VAE(prior, dgm.Normal(3, MLP((2,), 6)), dgm.Normal(2, MLP((3,), 4)))
    x: Tensor = torch.randn(8, 3)
    history: dgm.History = dgm.fit(vae, dgm.Data(x), epochs=1, device="cpu")
    z: Tensor = vae.encoder(x).sample()
    nats: float = dgm.evaluate(vae, dgm.Data(x)).nats
    named: dgm.Program = dgm.build("vae", dgm.Data(x), prior="flow")
    dgm.save(vae, tmp_path / "vae")
    loaded: dgm.Program = dgm.load(tmp_path / "vae")
    draws: Tensor = loaded.sample(4)
    figure = dgm.plots.samples(draws)
    figure.savefig(tmp_path / "draws.png")
    weights: Tensor = named.log_weights(x, num_particles=2)
    assert isinstance(history, dgm.History)
    assert isinstance(nats, float)
    assert z.shape == (8, 2)
    assert draws.shape == (4, 3)
    assert weights.shape == (2, 8)


def test_what_is_given_to_a_classifier_is_typed() -> None:
    labels, pixels = dgm.Categorical((), 2), dgm.Normal(3, MLP((), 6, num_classes=2))
    labeled = dgm.Labeled(labels, pixels, dgm.Categorical((), 2, MLP((3,), 2)))
    logits: Tensor = labeled.classifier(torch.zeros(4, 3)).logits
    assert logits.shape == (4, 2)


def test_mistakes_are_seen_before_the_script_runs() -> None:
    data = dgm.Data(torch.randn(8, 3))
    with pytest.raises(ValueError, match="'made' takes no prior"):
        dgm.build("made", data, prior="flow")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="priour"):
        dgm.build("vae", data, priour="flow")  # type: ignore[call-overload]
    with pytest.raises(AttributeError, match="dgm_pyro has no 'bild'"):
        dgm.bild  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match=r"dgm_pyro has no 'RealNVP': did you mean dgm\.flow\.realnvp\?"):
        dgm.RealNVP  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match=r"dgm_pyro has no 'xyzzy'$"):
        dgm.xyzzy  # type: ignore[attr-defined]  # noqa: B018


def test_the_class_of_a_program_by_name_is_typed() -> None:
    data = dgm.Data(torch.randn(8, 3), torch.arange(8) % 2)
    vae: dgm.VAE = dgm.build("vae", data, prior="flow", standardize=False)
    labeled: dgm.Labeled = dgm.build("vae", data, labeled=True, latent_size=2)
    classifier: dgm.Discriminative = dgm.build("classifier", data)
    assert isinstance(vae, dgm.VAE)
    assert isinstance(labeled, dgm.Labeled)
    assert isinstance(classifier, dgm.Discriminative)


@pytest.mark.skipif(not hasattr(typing, "get_overloads"), reason="Python 3.10 forgets overloads")
def test_the_typed_options_of_a_model_are_those_that_it_takes() -> None:
    whole = inspect.signature(catalog.build).parameters
    parts = {"prior", "encoder", "likelihood", "latent_size", "hidden"}
    named: dict[str, bool] = {}
    for overload in typing.get_overloads(catalog.build):  # type: ignore[attr-defined,unused-ignore]
        parameters = inspect.signature(overload).parameters
        assert list(parameters) == [name for name in whole if name in parameters]
        for name, parameter in parameters.items():
            narrowed = "Literal" in parameter.annotation
            assert narrowed or parameter.annotation == whole[name].annotation, f"{name}: {parameter.annotation}"
        models = parameters["model"].annotation
        takes = parts <= parameters.keys()
        assert takes or not parts & parameters.keys()
        for model in typing.get_args(eval(models, {**vars(catalog)})) if "Literal" in models else ():
            named[model] = named.get(model, False) or takes
    assert named.keys() <= catalog.MODELS.keys()
    data, options = dgm.Data(torch.randn(4, 3), torch.arange(4) % 2), dict[str, typing.Any](prior="flow")
    for model in catalog.MODELS:
        if named.get(model):
            continue
        with pytest.raises(ValueError, match="takes no prior"):
            dgm.build(model, data, **options)
