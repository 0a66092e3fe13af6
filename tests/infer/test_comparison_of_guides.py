"""Guides compared: the numbers of a row from the draws by hand, on a posterior that is known exactly."""

import dataclasses
import json
import math
import re
import sys
import zipfile

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import dgm_pyro as dgm
from dgm_pyro import cli, plots
from dgm_pyro.experiments import inference
from dgm_pyro.families import autoguide
from dgm_pyro.infer import Chains, compare, train_guide
from dgm_pyro.infer.compare import _anneal_both_ways, _distances

pytestmark = pytest.mark.usefixtures("float64")

FACTOR = torch.tensor([[1.0, 0.0], [1.8, 0.9]], dtype=torch.float64)


def correlated():
    pyro.sample("z", dist.MultivariateNormal(torch.tensor([1.0, -3.0]), scale_tril=FACTOR))


def draws(size=4000):
    torch.manual_seed(5)
    return {"z": dist.MultivariateNormal(torch.tensor([1.0, -3.0]), scale_tril=FACTOR).sample((size,))}


@pytest.fixture(scope="module")
def table():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return compare(correlated, guides=["meanfield", "fullrank", AutoNormal], reference=draws(),
                       gradient_steps=100, num_samples=4000, num_temperatures=25, num_data=2)  # fmt: skip
    finally:
        torch.set_default_dtype(before)


def test_the_right_family_is_close_and_the_mean_field_is_not(table):
    meanfield, fullrank = table["meanfield"], table["fullrank"]
    assert fullrank.close
    assert abs(fullrank.weighted.log_evidence) < 0.02
    assert abs(table.sandwich[0]) < 0.2
    assert abs(table.sandwich[1]) < 0.2
    assert table.simulated.lower.abs().max() < 0.2  # without data p(y) is 1
    assert table.simulated.upper.abs().max() < 0.2
    assert not meanfield.close
    # The best mean field has the precisions of the diagonal.
    sd = torch.linalg.inv(FACTOR @ FACTOR.T).diagonal().rsqrt()
    ratio = sd / (FACTOR @ FACTOR.T).diagonal().sqrt()
    assert torch.allclose(meanfield.sd_ratios["z"], ratio, atol=0.06)
    assert meanfield.sd_ratio[1] in ("z[0]", "z[1]")
    assert abs(meanfield.sd_ratio[0] - ratio.min()) < 0.06
    gap = 0.5 * (torch.linalg.inv(FACTOR @ FACTOR.T).diagonal().log().sum() + 2 * FACTOR.logdet())
    assert abs(meanfield.weighted.elbo + gap) < 0.06


def test_distances_to_the_reference(table):
    assert table["meanfield"].wasserstein[0] > 2 * table.floor[0]
    assert table["meanfield"].mmd[0] > table.floor[1] + 5 * table["meanfield"].mmd[1]
    assert table["fullrank"].wasserstein[0] < 1.5 * table.floor[0]


def test_what_it_prints(table):
    text = str(table)
    assert "fullrank: close to the reference" in text
    assert "meanfield: the sd of z[" in text
    assert "between their halves" in text
    assert "a stochastic upper bound if these are exact" in text
    assert "on 2 data sets simulated by the model: the stochastic lower and upper bounds are" in text
    json.dumps(table.as_dict(), allow_nan=False)
    assert [row["guide"] for row in table.as_dict()["guides"]] == ["meanfield", "fullrank", "AutoNormal"]


# -- bounds on the evidence, and what is none --------------------------------------------------------------------------

Y = torch.tensor([1.4, -0.3, 0.9], dtype=torch.float64)
VARIANCE = 1 / (1 + len(Y) / 0.25)


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 0.5), obs=y)


def evidence(y):
    """log p(y) of `conjugate`, for each row."""
    covariance = torch.ones(3, 3) + 0.25 * torch.eye(3)
    return dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(y)


def test_annealing_back_bounds_the_evidence_from_exact_draws_alone():
    """A weight of the way there has the mean p(y), and one of the way back 1 / p(y): so their logs are bounds."""
    posterior, truth = dgm.Posterior(conjugate, Y), evidence(Y)
    torch.manual_seed(0)
    exact = dist.Normal(VARIANCE * Y.sum() / 0.25, VARIANCE**0.5).sample((200, 1))
    (lower, upper), (error, other) = _anneal_both_ways(posterior, exact, 2, 0, False, num_chains=200)
    assert abs(math.expm1(lower - truth)) < 4.5 * error
    assert abs(math.expm1(truth - upper)) < 4.5 * other
    wide = torch.randn(200, 1)
    (_, no_bound), (_, error) = _anneal_both_ways(posterior, wide, 2, 0, False, num_chains=200)
    assert no_bound < truth - 4.5 * error


def vague(y):
    """A datum that says little: few temperatures are enough."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
    pyro.sample("y", dist.Normal(mu, 2.0), obs=y)


def test_the_bounds_on_simulated_data_bracket_their_evidence():
    found = compare(dgm.Posterior(vague, Y[0]), guides=["meanfield"], reference=None, gradient_steps=1,
                    num_particles=2, num_samples=100, num_temperatures=3, num_data=2)  # fmt: skip
    truth = dist.Normal(torch.zeros(()), 5**0.5).log_prob(found.simulated.x["y"])
    for bound in (found.simulated.lower, found.simulated.upper):
        assert ((bound - truth).abs() < 0.2).all()
        assert len((bound - truth).unique()) == 2, "each data set has noise of its own"
    assert found.sandwich is None
    assert found.as_dict()["simulated"]["upper"] == found.simulated.upper.tolist()
    far = dataclasses.replace(found.simulated, upper=found.simulated.lower + 1.5)
    assert "more temperatures" not in str(found)
    assert "nats apart; more temperatures bring them closer" in str(dataclasses.replace(found, simulated=far))


def test_a_model_that_makes_no_data_has_no_simulated_bounds():
    def penalized():
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
        pyro.factor("penalty", -(mu**2))

    options = {"guides": ["meanfield"], "gradient_steps": 1, "num_particles": 2, "num_samples": 100}
    found = compare(penalized, reference={"mu": torch.randn(20)}, num_temperatures=3, **options)
    assert found.simulated is None
    assert "on both sides" not in str(found)
    # The integral of N(mu; 0, 1) exp(-mu^2) is 1 / sqrt(3).
    assert abs(found.sandwich[0] + 0.5 * math.log(3)) < 4.5 * found.sandwich_errors[0]


# -- restarts ----------------------------------------------------------------------------------------------------------


def two_modes():
    """One of them has 0.9 of the mass."""
    z = pyro.sample("z", dist.Normal(torch.zeros(()), 20.0))
    modes = dist.Normal(torch.tensor([-1.0, 1.5]), 0.2).log_prob(z) + torch.tensor([0.1, 0.9]).log()
    pyro.factor("modes", modes.logsumexp(-1))


def test_the_best_start_is_kept_and_named(monkeypatch):
    monkeypatch.setattr(autoguide, "STEPS", 20)  # of the Normal to start from
    options = {"reference": None, "gradient_steps": 20, "num_particles": 8, "num_samples": 100, "num_temperatures": 0}
    found = compare(two_modes, guides=["meanfield", AutoNormal], restarts=3, **options)
    meanfield, other = found.rows
    assert (meanfield.restarts, other.restarts) == (3, 1)
    assert meanfield.evaluations > 2 * other.evaluations
    assert f"{meanfield.start + 1} of 3" in str(found)
    assert "1 of 1" in str(found)
    assert meanfield.as_dict()["start"] == meanfield.start
    # It is the one that the same start finds alone.
    each = []
    for start in range(3):
        guide = dgm.guides.auto(two_modes, "meanfield")
        guide.start = start
        with torch.random.fork_rng():
            torch.manual_seed(start)
            guide._setup_prototype()
        each.append(train_guide(dgm.Posterior(two_modes), guide, gradient_steps=20, num_particles=8, seed=start))
    last = [sum(values[-2:]) / 2 for values in each]
    assert meanfield.start == max(range(3), key=last.__getitem__)


def test_restarts_in_two_processes_are_those_in_one():
    """In the dtype of this one; rounding alone may differ."""
    found = []
    for jobs in (1, 2):
        guide = dgm.guides.auto(correlated, "fullrank")
        options = {"gradient_steps": 10, "num_particles": 4, "restarts": 2}
        values = train_guide(dgm.Posterior(correlated), guide, jobs=jobs, **options)
        found.append((values, guide.start, guide.state_dict()))
    (alone, start, state), (together, other, theirs) = found
    assert together == pytest.approx(alone, abs=1e-6)
    assert other == start
    for name, value in state.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-6, atol=1e-6)


def test_a_reference_that_did_not_mix_is_named(table):
    torch.manual_seed(0)
    z = torch.randn(4, 100, 2) + 3 * torch.arange(4.0)[:, None, None]
    flags = torch.zeros(4, 100, dtype=torch.bool)
    chains = Chains({"z": z}, z, flags, flags.long(), torch.randn(4, 100), torch.ones(4), 1, 1.0)
    doubtful = dataclasses.replace(table, chains=chains)
    assert "the reference is not reliable: R-hat is" in str(doubtful)
    assert doubtful.as_dict()["chains"]["r_hat"] > 1.5
    assert "not reliable" not in str(table)


def test_guides_of_one_kind_do_not_share_parameters():
    found = compare(correlated, guides=[AutoNormal, "AutoNormal"], reference=None, gradient_steps=30, num_samples=100,
                    num_temperatures=0)  # fmt: skip
    assert len(found.rows) == 2
    assert not dict(pyro.get_param_store())


def test_names_of_sites_may_hold_brackets():
    """Sites that are stated in a loop have names such as w[0]."""

    def model():
        for i in range(2):
            pyro.sample(f"w[{i}]", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    found = compare(dgm.Posterior(model), guides=["meanfield"], reference=None, gradient_steps=1, num_samples=100,
                    num_temperatures=0)  # fmt: skip
    drawn = {axis.get_title("left") for axis in plots.marginals(found).axes}
    assert {f"w[{i}][{j}]" for i in range(2) for j in range(2)} <= drawn
    errors, ratios = {"w[0]": torch.tensor([0.1, 0.5])}, {"w[0]": torch.tensor([0.5, 1.5]), "w": torch.tensor(1.1)}
    row = dataclasses.replace(found.rows[0], mean_errors=errors, sd_ratios=ratios)
    assert (row.mean_error, row.sd_ratio) == ((0.5, "w[0][1]"), (0.5, "w[0][0]"))


def test_distances_of_known_samples():
    """Shifted by s along one axis: W1 is s E|cos|, which is 2 s / pi in the plane."""
    torch.manual_seed(0)
    a, b = torch.randn(3000, 2), torch.randn(3000, 2)
    (near, near_error), (mmd, _) = _distances(a, b)
    (far, error), (apart, apart_error) = _distances(a + torch.tensor([3.0, 0.0]), b)
    assert near < 0.12
    assert near_error < 0.02
    assert abs(far - 6 / math.pi) < 0.15 + 4.5 * error
    # k = exp(-d^2 / (2 D)): E k = 2 / (1 + 2 / D), D = 2, at a shift s times exp(-s^2 / (2 (D + 2))).
    same = 1 / 2
    truth = math.sqrt(2 * same * (1 - math.exp(-9 / 8)))
    assert abs(apart - truth) < 4.5 * apart_error + 0.01
    assert mmd < 0.05


def test_a_fitted_guide_is_taken_as_it_is():
    posterior = dgm.Posterior(correlated)
    guide = dgm.guides.auto(correlated, "fullrank")
    values = train_guide(posterior, guide, objective=dgm.IWAE(16), num_particles=16, gradient_steps=60)
    assert len(values) == 60
    assert values[-1] > -0.1
    before = [p.detach().clone() for p in guide.parameters()]
    found = compare(posterior, guides=[guide], reference=None, num_samples=200, num_temperatures=0)
    assert all(map(torch.equal, before, guide.parameters()))
    assert found.rows[0].evaluations == 0


def one_latent(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def test_the_default_guides_fit_one_latent():
    y = torch.tensor(1.0)
    found = compare(one_latent, y, reference=None, gradient_steps=60, num_samples=200, num_temperatures=0, num_data=0)
    assert [row.name for row in found.rows] == ["meanfield", "planar"]
    exact = dist.Normal(0.0, 2.0**0.5).log_prob(y)
    assert all(abs(row.weighted.log_evidence - exact) < 0.02 for row in found.rows)


def test_what_a_guide_or_data_cannot_be_is_told_before_the_chains(monkeypatch):
    monkeypatch.setattr(sys.modules["dgm_pyro.infer.compare"], "nuts", None)
    posterior = dgm.Posterior(one_latent, torch.tensor(1.0))
    with pytest.raises(
        ValueError, match=r"guide 'realnvp' needs two latents, but the model has one: use meanfield or planar"
    ):
        compare(posterior, guides=["meanfield", "realnvp"])
    with pytest.raises(TypeError, match=r"a Posterior has its data already: leave out the arguments after it"):
        compare(posterior, ["meanfield"])


def test_what_does_not_fit():
    with pytest.raises(TypeError, match="guides must be a list"):
        compare(correlated, guides="nsf")
    with pytest.raises(TypeError, match="reference must be 'nuts'"):
        compare(correlated, reference=3)
    with pytest.raises(ValueError, match="q must be one of"):
        compare(correlated, guides=["gaussian"], reference=None)
    with pytest.raises(ValueError, match="leave objective out"):
        train_guide(dgm.Posterior(correlated), AutoNormal(correlated), objective=dgm.IWAE(3), gradient_steps=2)


def test_pictures_hold_the_draws(table):
    figure = plots.marginals(table)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["z[1]", "z[0]"]
    assert figure.get_suptitle() == ""
    assert plots.marginals(table, most=1, title="posterior").get_suptitle() == "posterior: 1 of 2 scalars"
    figure = plots.pairs(table, "meanfield")
    assert len(figure.axes) == 3
    assert [label.get_text() for label in figure.legends[0].get_texts()] == ["reference", "meanfield"]
    bars = plots.k_hats(table).axes[0].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([float(row.weighted.k_hat) for row in table.rows])
    with pytest.raises(ValueError, match="guide must be one of"):
        plots.pairs(table, "nsf")


SCHOOLS = """
import pyro, pyro.distributions as dist

def model(y, sigma=1.0):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("schools", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)
"""


@pytest.fixture
def schools(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schools.py").write_text(SCHOOLS)
    (tmp_path / "data.json").write_text('{"y": [28.0, 8.0, -3.0], "J": 3}')
    return tmp_path


def test_the_command_writes_a_folder(schools, capsys):
    command = ["infer", "schools.py:model", "--data", "data.json", "--guides", "fullrank", "--gradient-steps", "20",
               "--num-samples", "120", "--reference", "none", "--num-temperatures", "0", "--restarts", "2",
               "--out", "found"]  # fmt: skip
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "Posterior(mu: 1 reals)" in printed
    assert "fullrank" in printed
    assert re.search(r"best start .*\n.*fullrank .* [12] of 2 ", printed)
    names = {"table.json", "table.txt", "marginals.png", "k-hats.png", "fullrank.npz",
             "fullrank-pairs.png", "fullrank.pt", "predictions.png", "prior-predictions.png"}  # fmt: skip
    assert {path.name for path in (schools / "found").iterdir()} == names
    with np.load(schools / "found" / "fullrank.npz") as stored:
        assert stored["mu"].shape == (120,)
        assert abs(stored["mu"].mean() - 33 / (3 + 1 / 25)) < 0.5
    posterior = inference.posterior_from("schools.py:model", "data.json")
    guide = dgm.guides.auto(posterior.model, "fullrank")
    guide(*posterior.args, **posterior.kwargs)
    guide.load_state_dict(torch.load(schools / "found" / "fullrank.pt", weights_only=True))


INTEGER = """
import pyro, pyro.distributions as dist
def model(y, s):
    file = pyro.sample("file", dist.Normal(0.0, s))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(file, 1.0), obs=y)
"""


def test_fits_are_kept_where_data_cannot_be_predicted_and_latents_may_have_any_name(schools):
    """Torch scores, but does not sample, a Normal with an integer for its scale."""
    (schools / "integer.py").write_text(INTEGER)
    (schools / "integer.json").write_text('{"y": [1.5, 2.5], "s": 1}')
    command = ["infer", "integer.py:model", "--data", "integer.json", "--guides", "meanfield", "--gradient-steps", "20",
               "--num-samples", "100", "--reference", "none", "--num-temperatures", "0", "--out", "found"]  # fmt: skip
    with pytest.warns(
        UserWarning, match=r"prior-predictions.png is not drawn, .* 1.0 is a real number and 1 an integer"
    ):
        assert cli.main(command) == 0
    with np.load(schools / "found" / "meanfield.npz") as stored:
        assert stored["file"].shape == stored["log_weights"].shape == (100,)


def test_pictures_visit_the_scalars_once_for_each_guide(table, monkeypatch):
    """Otherwise the time would grow with the square of the number of latents."""
    visits, scalars = [], plots._scalars
    monkeypatch.setattr(plots, "_scalars", lambda values: visits.append(values) or scalars(values))
    plots.marginals(table)
    assert len(visits) == 1 + 2 * len(table.rows)  # draws of the reference, and draws and errors of each guide


def test_arrays_may_exceed_the_limit_of_plain_zip_files(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)  # bytes, instead of 2 GiB
    inference._write_arrays(tmp_path / "draws.npz", {"z": torch.arange(100.0)})
    with np.load(tmp_path / "draws.npz") as stored:
        assert np.array_equal(stored["z"], np.arange(100.0))


def test_the_command_calibrates_the_guides(schools, capsys):
    command = ["infer", "schools.py:model", "--data", "data.json", "--guides", "meanfield", "--gradient-steps", "2",
               "--num-samples", "100", "--reference", "none", "--num-temperatures", "0", "--calibrate", "2",
               "--jobs", "2", "--out", "found", "--json"]  # fmt: skip
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)["calibration"]["meanfield"]
    posterior = inference.posterior_from("schools.py:model", "data.json")
    assert found == dgm.infer.sbc(posterior, method="meanfield", num_samples=2, bins=2, gradient_steps=2).as_dict()
    assert json.loads((schools / "found" / "meanfield-calibration.json").read_text()) == found
    assert (schools / "found" / "meanfield-coverage.png").is_file()


def test_a_model_that_makes_no_data_is_told_before_the_fits(schools, capsys):
    penalty = "    import torch\n    pyro.factor('penalty', torch.as_tensor(-(mu**2)))\n"
    (schools / "schools.py").write_text(SCHOOLS + penalty)
    assert cli.main(["infer", "schools.py:model", "--data", "data.json", "--calibrate", "2", "--out", "found"]) == 1
    assert "the factor 'penalty' is no distribution, so no data can be simulated" in capsys.readouterr().err
    assert not (schools / "found").exists()


@pytest.mark.parametrize(
    ("statement", "told"),
    [("pyro.plate('none', 0)", " raises ZeroDivisionError when it is run: size cannot be zero"),
     ("mu + 'kg'", " raises TypeError when it is run: unsupported operand type(s) for +: 'Tensor' and 'str'"),
     ("raise ValueError('y is a table')", ": y is a table"),
     ("raise SystemExit(3)", " raises SystemExit when it is run: 3")],
)  # fmt: skip
def test_what_a_model_raises_is_told_in_one_line(schools, capsys, statement, told):
    (schools / "schools.py").write_text(f"{SCHOOLS}    {statement}\n")
    assert cli.main(["infer", "schools.py:model", "--data", "data.json", "--out", "found"]) == 1
    assert capsys.readouterr().err == f"dgm: schools.py:model with data.json{told}\n"


def test_an_out_that_is_a_file_is_told_before_the_fits(schools, capsys, monkeypatch):
    monkeypatch.setattr(inference, "compare", lambda *args, **options: pytest.fail("the guides were fitted"))
    assert cli.main(["infer", "schools.py:model", "--data", "data.json", "--out", "data.json"]) == 1
    assert "data.json is a file, but the results are a folder: choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "must hold an object of arguments by name, got a list"),
        ('{"x": 1}', "lacks 'y' of the model: it has x"),
        ("{", "is no JSON file of data"),
    ],
)
def test_data_that_do_not_fit_are_told_in_one_line(schools, capsys, content, message):
    (schools / "data.json").write_text(content)
    assert cli.main(["infer", "schools.py:model", "--data", "data.json"]) == 1
    assert message in capsys.readouterr().err
