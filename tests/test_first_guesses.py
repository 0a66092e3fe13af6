"""What a newcomer tries first works, or the error says what to write instead."""

import inspect
import re
import subprocess
import sys

import pyro.distributions as dist
import pytest
import torch
from programs import CASES
from torch import nn

import dgm_pyro as dgm


def vae():
    return dgm.VAE(dgm.Normal(2), dgm.Normal(3, nn.Linear(2, 6)), dgm.Normal(2, nn.Linear(3, 4)))


def test_encode_and_decode_are_methods():
    program, x = vae(), torch.randn(5, 3)
    assert torch.equal(program.encode(x), program.encoder(x).mean)
    assert torch.equal(program.decode(program.encode(x)), program.likelihood(program.encoder(x).mean).mean)


def test_one_sample_is_the_default():
    assert vae().sample().shape == (1, 3)


@pytest.mark.parametrize("name", ["vae", "made", "diffusion", "maf", "labeled", "dequantized"])
def test_samples_by_other_names_are_answered_with_the_right_one(name):
    program = next(case.build() for key, case in CASES.items() if key.startswith(name))
    for unknown in ({"label": 1}, {"labels": [1]}, {"n": 3}, {"temperature": 0.5}):
        with pytest.raises(TypeError, match=rf"takes no {next(iter(unknown))}: .*given=torch.tensor"):
            program.sample(**unknown)
    with pytest.raises(TypeError, match=r"num_samples must be an integer, got the shape \(3,\): use sample\(3\)"):
        program.sample((3,))
    with pytest.raises(TypeError, match=r"sample\(6\)"):
        program.sample(torch.Size((2, 3)))


def test_the_answer_names_arguments_that_there_are():
    with pytest.raises(TypeError, match="a diffusion takes") as raised:
        CASES["vae"].build().sample(steps=3)
    named = re.search("a diffusion takes (.*), too", str(raised.value))[1]
    assert set(re.findall(r"\w+", named)) - {"and"} <= set(inspect.signature(dgm.Diffusion.sample).parameters)


def test_a_program_without_codes_says_so():
    with pytest.raises(ValueError, match="this Autoregressive has no latent code: use a VAE, a flow or a diffusion"):
        CASES["made"].build().encode(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="has no latent code"):
        dgm.Normal(2).decode(torch.zeros(2, 2))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: dgm.VAE(dist.Normal(0, 1), dgm.Normal(3, nn.Linear(2, 6)), dgm.Normal(2, nn.Linear(3, 4))),
        lambda: dgm.VAE(dgm.Normal(2), dist.Normal(0, 1), dgm.Normal(2, nn.Linear(3, 4))),
        lambda: dgm.VAE(dgm.Normal(2), dgm.Normal(3, nn.Linear(2, 6)), dist.Normal(0, 1)),
        lambda: dgm.build("vae", dgm.data.load("digits", num_data=10), prior=dist.Normal(0, 1)),
        lambda: dgm.build("vae", dgm.data.load("digits", num_data=10), encoder=torch.distributions.Normal(0, 1)),
        lambda: dgm.Flow(2, [], dist.Normal(0, 1)),
        lambda: dgm.Dequantized(dist.Normal(0, 1), 4),
        lambda: dgm.Autoregressive(dist.Normal(0, 1)),
        lambda: dgm.Labeled(dgm.Categorical((), 2), dist.Normal(0, 1)),
        lambda: dgm.Implicit(2, dist.Normal(0, 1), nn.Linear(2, 2)),
        lambda: dgm.evaluate(dist.Normal(0, 1), torch.zeros(3)),
    ],
)
def test_a_distribution_where_a_program_belongs(wrong):
    with pytest.raises(TypeError, match=r"got the distribution Normal: use a program such as dgm.Normal\(shape\)"):
        wrong()


def test_the_version():
    assert dgm.__version__


@pytest.mark.parametrize("arguments", [(), ("--help",), ("train", "--help"), ("anomaly", "--help"), ("--version",)])
def test_help_imports_no_torch(arguments):
    """It takes seconds of processor time."""
    run = f"import sys\nfrom dgm_pyro.cli import main\nassert main({list(arguments)}) == 0\n"
    ask = run + "assert not {'torch', 'pyro', 'numpy', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", ask], check=True, capture_output=True)
