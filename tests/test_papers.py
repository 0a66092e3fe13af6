"""benchmarks/papers.py: five models in plain Pyro, whose density is that of Pyro's own traces."""

import json

import pytest
import torch
from scripts import load_script
from test_posterior import by_pyro

import dgm_pyro as dgm
from dgm_pyro.experiments import inference

NAMES = ("cox_process", "epidemic", "dirichlet_process", "horseshoe", "neural_network")


@pytest.fixture(scope="module")
def papers():
    return load_script("benchmarks/papers.py")


@pytest.fixture(scope="module")
def data(papers):
    return papers.simulated()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", NAMES)
def test_the_density_is_that_of_the_trace(papers, data, name):
    arguments = {key: torch.as_tensor(value) for key, value in data[name].items()}
    model = papers.Network() if name == "neural_network" else getattr(papers, name)  # built in double precision
    posterior = dgm.Posterior(model, **arguments)
    u = 0.3 * torch.randn(2, posterior.D, generator=torch.Generator().manual_seed(1))
    values, found = posterior.constrain(u), posterior.log_joint(u)
    for i in range(2):
        trace, log_det = by_pyro(posterior, {site: value[i] for site, value in values.items()})
        assert abs(found[i] - trace - log_det) < 1e-9 * max(1.0, abs(float(trace)))


def test_a_module_is_recorded_and_fitted(papers, data, tmp_path):
    """Its priors were expanded where validation is on, and Pyro keeps no local parameters for it."""
    stored = tmp_path / "data.json"
    stored.write_text(json.dumps(data["neural_network"] | {"comment": 1}))
    arguments = inference.arguments_in(papers.neural_network, stored)
    assert set(arguments) == {"x", "y"}
    posterior = dgm.Posterior(papers.neural_network, **arguments)
    assert posterior.compiled(2).__name__ == "run"  # without Pyro's handlers
    found = dgm.infer.compare(posterior, guides=["meanfield"], reference=None, gradient_steps=2, num_samples=100)
    assert not found.failures
    assert not hasattr(papers.neural_network._pyro_context, "param_state"), "the user's module is left as it was"
    assert found.rows[0].weighted.log_evidence.isfinite()
    stored.write_text('{"x": [1.0]}')
    with pytest.raises(ValueError, match="lacks 'y' of the model"):
        inference.arguments_in(papers.neural_network, stored)
