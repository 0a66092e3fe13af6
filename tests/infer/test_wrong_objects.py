"""Whatever is no program and no posterior: each function answers in one line of ours that says what to pass."""

import functools
import math
import traceback
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

import dgm_pyro as dgm
from dgm_pyro import infer

ROOT = str(Path(dgm.__file__).parent)
X = torch.zeros(3, 2)
FLAT = dist.Normal(torch.zeros(1), 1.0).to_event(1)


def model(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.mu = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, y):
        pyro.sample("y", dist.Normal(self.mu, 1.0), obs=y)


class Callable:
    def model(self, y):
        return model(y)

    __call__ = model


WRAP = r"wrap a Pyro model with its data, dgm\.Posterior\(model, \*args\)"
ALONE = "pass the model alone"
# What is passed, what the functions of a program or posterior say, and what those that take a model say; None where it
# is a model.
WRONG = {
    "a model": (model, WRAP, None),
    "a lambda": (lambda y: model(y), WRAP, None),
    "a PyroModule": (Regression(), WRAP, None),
    "a bound method": (Callable().model, WRAP, None),
    "a callable object": (Callable(), WRAP, None),
    "a partial": (functools.partial(model, X), WRAP, None),
    "a conditioned model": (pyro.condition(model, data={"y": X}), WRAP, None),
    "a class of modules": (Regression, f"the class Regression: make an object of it, and {WRAP}", "class Regression"),
    "a class of guides": (AutoNormal, r"guides=\[AutoNormal\]", "the class AutoNormal"),
    "a class of programs": (dgm.VAE, "got the class VAE: make an object of it$", "the class VAE"),
    "a class of distributions": (dist.Normal, "got the class Normal", "the class Normal"),
    "a guide": (AutoNormal(model), "it is a guide; wrap the model", "pass its model"),
    "a pair": ((model, AutoNormal(model)), "wrap the model of the pair", ALONE),
    "a distribution": (FLAT, r"a program such as dgm\.Normal\(shape\)", "state it in a model"),
    "a distribution of torch": (torch.distributions.Normal(0.0, 1.0), "dgm.Conditional", "state it in a model"),
    "a tensor": (X, "data come second", "got Tensor: pass the function or PyroModule"),
    "a numpy array": (np.zeros(3), "data come second", "got ndarray: pass the function or PyroModule"),
    "data": (dgm.Data(X), "data come second", "got Data: pass the function or PyroModule"),
    "a network": (nn.Linear(2, 2), "make it that of a conditional", None),
    "a name": ("vae", r"dgm\.build\(name, data\) makes a program", "got str: pass the function or PyroModule"),
    "a number": (3, WRAP, "got int: pass the function or PyroModule"),
    "nothing": (None, WRAP, "got NoneType: pass the function or PyroModule"),
    "a list": ([model], WRAP, "got list: pass the function or PyroModule"),
    "a dict": ({"mu": X}, WRAP, "got dict: pass the function or PyroModule"),
    "a trace": (pyro.poutine.trace(model).get_trace(X[0, 0]), WRAP, "got Trace: pass the function or PyroModule"),
    "SVI": (SVI(model, model, pyro.optim.Adam({}), Trace_ELBO()), f"it runs a model; {WRAP}", ALONE),
    "Predictive": (Predictive(model, num_samples=1), f"it runs a model; {WRAP}", ALONE),
    "MCMC": (MCMC(NUTS(model), num_samples=1, warmup_steps=1), f"it runs a model; {WRAP}", ALONE),
}  # fmt: skip
OF_PROGRAMS = {
    "ais": lambda wrong: infer.ais(wrong, X),
    "ais without data": infer.ais,
    "bidirectional": lambda wrong: infer.bidirectional(wrong, 2),
    "smc": lambda wrong: infer.smc(wrong, X),
    "nuts": lambda wrong: infer.nuts(wrong, X),
    "nuts without data": infer.nuts,
    "psis": lambda wrong: infer.psis(wrong, X),
    "psis with a guide": lambda wrong: infer.psis(wrong, guide=FLAT),
    "sbc": infer.sbc,
    "sbc with a method": lambda wrong: infer.sbc(wrong, method="meanfield"),
    "check": lambda wrong: infer.check(wrong, X),
    "units": lambda wrong: infer.units(wrong, X),
    "gaps": lambda wrong: infer.gaps(wrong, X),
    "gaps with a guide": lambda wrong: infer.gaps(wrong, guide=FLAT),
    "evaluate": lambda wrong: dgm.evaluate(wrong, X),
    "evaluate with a guide": lambda wrong: dgm.evaluate(wrong, guide=FLAT),
}
OF_MODELS = {
    "Posterior": dgm.Posterior,
    "compare": lambda wrong: infer.compare(wrong, X),
    "auto": dgm.guides.auto,
}
OF_POSTERIORS = {
    "train_guide": lambda wrong: infer.train_guide(wrong, nn.Linear(2, 2)),
    "predictive_check": infer.predictive_check,
}


def refuse(call, wrong, message):
    with pytest.raises(TypeError, match=message) as caught:
        call(wrong)
    assert caught.traceback[-1].path.is_relative_to(ROOT), "the error is not ours"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_object_is_answered_with_what_to_pass(name):
    wrong, of_program, of_model = WRONG[name]
    for call in OF_PROGRAMS.values():
        refuse(call, wrong, of_program)
    for call in OF_MODELS.values() if of_model else ():
        refuse(call, wrong, of_model)
    for call in OF_POSTERIORS.values():
        refuse(
            call, wrong, r"must be a dgm\.Posterior, dgm\.Posterior\(model, \*args\) of a Pyro model and its data, got"
        )


def test_arguments_that_do_not_fit_the_model_are_told():
    message = (
        r"args do not fit the model, which takes \(y\): missing a required argument: 'y'; pass the model's arguments "
        r"after the model \(--data\)"
    )
    for call in (dgm.Posterior, infer.compare):
        for each in (model, Regression(), Callable().model):
            refuse(call, each, message)
    refuse(lambda each: dgm.Posterior(each, X, X), model, "too many positional arguments")


def test_an_error_of_the_model_stays_its_own():
    def broken(y):
        pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
        return math.sqrt(None)

    with pytest.raises(TypeError, match="must be real number") as caught:
        dgm.Posterior(broken, X)
    assert traceback.extract_tb(caught.tb)[-1].name == "broken"


def test_a_posterior_is_no_model():
    posterior = dgm.Posterior(model, X)
    for call in (dgm.Posterior, dgm.guides.auto):
        refuse(call, posterior, "is a Posterior already")
