"""What a program prints: against formulas by hand, the graphs that models were built with, and its own numbers."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import CASES, EVERY_PART, continuous, diffusion, pixelcnn
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.infer.inspect import get_dependencies
from torch import nn

import dgm_pyro as dgm
from dgm_pyro import factors
from dgm_pyro.program import batch_plates, log_prob_sum

pytestmark = pytest.mark.usefixtures("float64")

CHAINS = ("diff", "made", "pixel", "transformer", "autoregressive")
both_forms = pytest.mark.parametrize(
    ("name", "unrolled"),
    [
        pytest.param(name, unrolled, marks=() if name in EVERY_PART else pytest.mark.nightly)
        for name in CASES
        for unrolled in (False, True)
        if not unrolled or any(part in name for part in CHAINS)
    ],
)


def built(name, unrolled=False):
    program = CASES[name].build()
    return program.unroll() if unrolled else program


def formula_of(name, program):
    """With ``given`` where the program leaves its shape open."""
    case = CASES[name]
    return program.formula(*([] if case.given_shape is None else [case.draw(program, 1)[1]]))


def equations(program):
    """The lines of p and q, without the table of sites."""
    lines = str(program).splitlines()[1:]
    return [line.split("  ", 2)[-1].strip() for line in lines if line.startswith(("  joint ", "  guide ", "     "))]


WRITTEN = {
    ("normal", False): ["p(x)"],
    ("normal-given-open", False): ["p(x | c)"],
    ("normal-given-label", False): ["p(x | y)"],
    ("normal-given-pair", False): ["p(x | c, y)"],
    ("vae", False): ["p(z) p(x | z)", "q(z | x)"],
    ("vae-given-label", False): ["p(z) p(x | z, y)", "q(z | x, y)"],
    ("vae-conditional-prior", False): ["p(z | y) p(x | z)", "q(z | x)"],
    ("vae-two-levels", False): ["p(z2) p(z | z2) p(x | z)", "q(z | x) q(z2 | z)"],
    ("vae-ladder", False): ["p(z2) p(z | z2) p(x | z)", "q(z2 | x) q(z | z2, x)"],
    ("vae-in-likelihood", False): ["p(z) p(u | z) p(x | z, u)", "q(z | x) q(u | z, x)"],
    ("vae-flow-prior", False): ["p(z) p(x | z)", "p(z) = p(u) |det du/dz|", "q(z | x)"],
    ("vae-flow-encoder", False): ["p(z) p(x | z)", "q(z | x) = q(u | x) |det du/dz|"],
    ("made", False): ["p(x) = p(x_1) p(x_2 | x_1) ... p(x_4 | x_<4)"],
    ("made", True): ["p(x_1) p(x_2 | x_1) ... p(x_4 | x_<4) [x = f(x_1, ..., x_4)]"],
    ("made-given-label", False): ["p(x | y) = p(x_1 | y) p(x_2 | x_1, y)"],
    ("realnvp-given-label", False): ["p(x | y) = p(u | y) |det du/dx|"],
    ("dequantized", False): [
        "p(x_continuous) p(x | x_continuous)",
        "p(x_continuous) = p(u) |det du/dx_continuous|",
        "q(x_continuous | x) = q(u | x) |det du/dx_continuous|",
    ],
    ("diffusion", False): [
        "p(x) = ∫ p(x_4) p(x_3 | x_4) ... p(x_1 | x_2) p(x | x_1) dx_4 ... dx_1",
        "q(x_shift) q(x_t | x, x_shift)",
    ],
    ("diffusion", True): [
        "p(x_4) p(x_3 | x_4) ... p(x_1 | x_2) p(x | x_1)",
        "q(x_4 | x) q(x_3 | x, x_4) ... q(x_1 | x, x_2)",
    ],
    ("diffusion-given-label", False): [
        "p(x | y) = ∫ p(x_4) p(x_3 | x_4, y) ... p(x_1 | x_2, y) p(x | x_1, y) dx_4 ... dx_1",
        "q(x_shift) q(x_t | x, x_shift)",
    ],
    ("continuous-diffusion-given-label", False): [
        "p(x | y) = ∫ p(x_10) p(x_9 | x_10, y) ... p(x_1 | x_2, y) p(x | x_1, y) dx_10 ... dx_1",
        "q(x_first | x) q(x_time) q(x_t | x, x_time)",
    ],
    ("labeled-vae", False): ["p(y) p(z) p(x | y, z)", "q(y) q(z | x, y)"],
    ("discriminative", False): ["p(y | x)"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "unrolled"), WRITTEN)
def test_a_program_prints_what_one_writes_by_hand(name, unrolled):
    def as_sets(line):  # of parents, whose order says nothing
        return "".join(", ".join(sorted(part.split(", "))) for part in _split(line))

    assert [as_sets(line) for line in equations(built(name, unrolled))] == [
        as_sets(line) for line in WRITTEN[name, unrolled]
    ]


def _split(line):
    return re.split(r"(\| |\))", line)


def test_a_formula_in_one_line_is_what_it_prints():
    for name in ("vae-two-levels", "vae-flow-encoder", "made", "normal"):
        formula = formula_of(name, built(name))
        assert [*filter(None, (formula.p, formula.q))] == [
            ", ".join(lines) for density in "pq" if (lines := formula._lines(density, factors._Text))
        ]
    assert formula_of("vae-flow-encoder", built("vae-flow-encoder")).p == "p(z) p(x | z)"
    assert formula.q == ""


def test_a_program_prints_its_sites_and_its_size():
    assert str(CASES["vae-bernoulli"].build()) == (
        "VAE, 70 parameters\n  joint  p(z) p(x | z)\n  guide  q(z | x)\n  z      Normal, (2,)\n  x      Bernoulli, (4,)"
    )


@both_forms
def test_printing_changes_nothing(name, unrolled):
    program = built(name, unrolled)
    weights = {key: value.clone() for key, value in program.state_dict().items()}
    modules, training = dict(program.named_modules()), program.training
    store, state = dict(pyro.get_param_store().items()), torch.get_rng_state()
    str(program), program._repr_latex_()
    assert torch.equal(state, torch.get_rng_state())
    assert dict(pyro.get_param_store().items()) == store
    assert dict(program.named_modules()) == modules
    assert program.training == training
    assert all(torch.equal(value, weights[key]) for key, value in program.state_dict().items())
    assert not any("unconstrained" in vars(parameter) for parameter in program.parameters())


@pytest.mark.parametrize("name", ["any-order", "made", "pixelcnn", "transformer"])
def test_no_feature_is_drawn_for_a_formula(name):
    """Drawing x takes one pass of the network per feature."""
    program = dgm.build(name, dgm.Data(torch.zeros(20, 1, 8, 8, dtype=torch.uint8), levels=3))
    passes = []
    program.factors.network.register_forward_hook(lambda *_: passes.append(1))
    program.formula()
    assert 1 <= len(passes) <= 2


def test_only_the_terms_that_are_shown_are_written(monkeypatch):
    """Terms of all of x_1 .. x_D have D^2 / 2 parents."""
    read, index = [], factors._chain_index
    monkeypatch.setattr(factors, "_chain_index", lambda site: read.append(site) or index(site))
    terms = factors.ChainRule(tuple(f"x_{i}" for i in range(1, 3073)), ("y",))
    chain = factors.Factor("x", ("y",), torch.Size([3072]), "Autoregressive", "data", terms)
    assert factors.Formula("chain", (chain,)).p == "p(x | y) = p(x_1 | y) p(x_2 | x_1, y) ... p(x_3072 | x_<3072, y)"
    assert len(read) < 20 * 3072
    assert terms[2] == ("x_3", ("x_1", "x_2", "y"))
    assert terms[1:3] == (("x_2", ("x_1", "y")), ("x_3", ("x_1", "x_2", "y")))
    assert terms[-1] == (terms.sites[-1], (*terms.sites[:-1], "y"))


@both_forms
def test_the_factors_are_the_whole_joint_and_its_latents(name, unrolled):
    case, program = CASES[name], built(name, unrolled)
    x, given = case.draw(program, 3)
    with poutine.trace() as traced, batch_plates((3,)):
        program.joint(program.variable, x, given)
    found = formula_of(name, program)
    assert set(found.latents) == set(program.latents(program.variable))
    sites = [factor.site for factor in found.joint if factor.kind != "deterministic"]
    torch.testing.assert_close(log_prob_sum(traced.trace, (3,), sites), log_prob_sum(traced.trace, (3,)))


@both_forms
def test_what_moves_a_density_is_a_parent(name, unrolled):
    """Every latent is moved in turn: the log-probabilities that move with it read it."""
    case, program = CASES[name], built(name, unrolled).eval()
    x, given = case.draw(program, 1)
    parents = {factor.site: factor.parents for factor in formula_of(name, program).joint}

    def log_probs(values):
        torch.manual_seed(0)
        with (
            pyro.validation_enabled(False),
            poutine.block(),
            poutine.trace() as traced,
            poutine.condition(data=values),
            batch_plates((1,)),
        ):
            program.joint(program.variable, x, given)
        traced.trace.compute_log_prob()
        nodes = {key: site for key, site in traced.trace.nodes.items() if site["type"] == "sample" and key in parents}
        return {key: site["log_prob"].sum() for key, site in nodes.items()}, {
            key: site["value"] for key, site in nodes.items() if not site["is_observed"]
        }

    before, values = log_probs({})
    for site, value in values.items():
        if not value.is_floating_point():
            continue
        moved, _ = log_probs(values | {site: value + 0.01 * (0.5 - value).sign()})
        read = {key for key, log_prob in moved.items() if not torch.equal(log_prob, before[key])} - {site}
        assert all(site in parents[key] for key in read), (site, read)


def random_graph(seed):
    """A model of Normals, each with the mean of a random set of those before it, the last two observed."""
    parents = {}
    generator = torch.Generator().manual_seed(seed)
    for i in range(8):
        before = [f"v{j}" for j in range(i)]
        parents[f"v{i}"] = [name for name in before if torch.rand((), generator=generator) < 0.4]

    def model(data):
        values = {}
        for name, above in parents.items():
            mean = sum((values[p].tanh() for p in above), torch.zeros(()))
            if name == "v3":
                mean = pyro.deterministic("half", mean / 2)
            observed = data if name == "v7" else None
            values[name] = pyro.sample(name, dist.Normal(mean, 1.0), obs=observed)
        pyro.factor("bonus", -(values["v2"] ** 2))

    return model, parents


@pytest.mark.parametrize("seed", range(10))
def test_the_parents_in_a_random_graph_are_those_it_was_built_with(seed):
    model, parents = random_graph(seed)
    found = {f.site: f for f in dgm.formula(model, torch.tensor(0.3)).joint}
    assert {name: set(found[name].parents) for name in parents} == {name: set(above) for name, above in parents.items()}
    assert set(found["half"].parents) == set(parents["v3"])
    assert set(found["bonus"].parents) == {"v2"}
    assert {name: factor.kind for name, factor in found.items() if factor.kind != "latent"} == {
        "half": "deterministic",
        "v7": "data",
        "bonus": "factor",
    }
    of_pyro = get_dependencies(model, (torch.tensor(0.3),))["prior_dependencies"]
    assert {name: set(above) - {name} for name, above in of_pyro.items()} == {
        name: set(found[name].parents) for name in of_pyro
    }


def test_a_pair_of_pyro_callables():
    def model(w, y=None):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(w)):
            pyro.sample("out", dist.Normal(b * w, 1.0), obs=y)

    def guide(w, y=None):
        pyro.sample("b", dist.Normal(pyro.param("loc", torch.zeros(())) * y.mean(), 1.0))

    found = dgm.formula((model, guide), torch.ones(5), torch.ones(5))
    assert str(found) == (
        "model\n  joint  p(b) p(out | b, w)\n  guide  q(b | out)\n  b      Normal, ()\n  out    Normal, ()"
    )
    assert not pyro.get_param_store().keys()


def test_a_plate_of_any_name_is_printed():
    class OwnPlate(dgm.Conditional):
        event_shape = torch.Size((2,))

        def joint(self, name, value=None, given=None):
            with pyro.plate("data", 4):
                w = pyro.sample("w", dist.Normal(0.0, 1.0))
            return pyro.sample(name, dist.Normal(w.sum(), 1.0).expand((2,)).to_event(1), obs=value)

    assert equations(OwnPlate()) == ["p(w) p(x | w)"]


def test_an_argument_is_named_after_the_site_that_observes_it_alone():
    """A factor and a deterministic site read it, too, and observe nothing."""

    def model(w):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.factor("bonus", b * w)
        pyro.deterministic("half", w / 2)
        pyro.sample("x", dist.Normal(b * w, 1.0))

    found = {factor.site: factor.parents for factor in dgm.formula(model, torch.tensor(2.0)).joint}
    assert found == {"b": (), "bonus": ("b", "w"), "half": ("w",), "x": ("b", "w")}


def test_an_autoguide_and_the_store_stay_as_they_are():
    def model():
        pyro.sample("b", dist.Normal(0.0, 1.0))

    guide = AutoNormal(model)
    with pytest.raises(
        ValueError, match="the guide of source, AutoNormal, makes its parameters in its first call: call it once"
    ):
        dgm.formula((model, guide))
    guide()
    assert str(dgm.formula((model, guide))).splitlines()[2] == "  guide  q(b_unconstrained) [b = f(b_unconstrained)]"
    pyro.clear_param_store()
    dgm.formula((model, guide))
    assert not pyro.get_param_store().keys()


def test_a_model_without_sites():
    assert str(dgm.formula(lambda: None)).strip() == "<lambda>"


def test_printing_inside_statements_adds_no_site():
    program = CASES["vae"].build()
    with poutine.trace() as traced:
        str(program)
    assert not set(traced.trace.nodes)


def test_a_program_of_ones_own_and_a_pair_of_views_say_the_same():
    program = CASES["vae-two-levels"].build()
    x, _ = CASES["vae-two-levels"].draw(program, 1)
    by_views = dgm.formula((program.model, program.guide), x)
    assert (by_views.joint, by_views.posterior) == (program.formula().joint, program.formula().posterior)


def test_values_written_in_place_are_followed():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        cache = torch.zeros(3)
        cache[1] = z
        pyro.sample("x", dist.Normal(cache.sum(), 1.0))

    assert dgm.formula(model).joint[1].parents == ("z",)


def test_latex():
    assert built("vae")._repr_latex_() == r"$$\begin{gathered}p(z) p(x \mid z) \\ q(z \mid x)\end{gathered}$$"
    assert built("realnvp")._repr_latex_() == (
        r"$$\begin{gathered}p(x) = p(u) \left|\det \frac{\partial u}{\partial x}\right|\end{gathered}$$"
    )
    assert built("made")._repr_latex_() == (
        r"$$\begin{gathered}p(x) = p(x_{1}) p(x_{2} \mid x_{1}) \cdots p(x_{4} \mid x_{<4})\end{gathered}$$"
    )


def test_html():
    x, z = "<i>x</i>", "<i>z</i>"
    assert built("vae-two-levels").formula().html() == (
        f"p({z}<sub>2</sub>) p({z} | {z}<sub>2</sub>) p({x} | {z})<br>q({z} | {x}) q({z}<sub>2</sub> | {z})"
    )
    assert built("realnvp").formula().html() == f"p({x}) = p(<i>u</i>) |det ∂<i>u</i>/∂{x}|"
    assert built("made").formula().html() == (
        f"p({x}) = p({x}<sub>1</sub>) p({x}<sub>2</sub> | {x}<sub>1</sub>) … p({x}<sub>4</sub> | {x}<sub>&lt;4</sub>)"
    )
    parts = dgm.Normal(2), dgm.Normal(3, nn.Linear(2, 6)), dgm.Normal(2, nn.Linear(3, 4))
    assert (
        dgm.VAE(*parts, latent_name="<b>_<c")
        .formula()
        .html()
        .startswith("p(<i>&lt;b&gt;</i><sub>&lt;c</sub>) p(<i>x</i>")
    )


def test_latex_escapes_names():
    parts = dgm.Normal(2), dgm.Normal(3, nn.Linear(2, 6)), dgm.Normal(2, nn.Linear(3, 4))
    assert r"p(\mathit{50\%\&\#}) p(x \mid" in dgm.VAE(*parts, latent_name="50%&#")._repr_latex_()


def test_repr_is_the_tree_of_modules():
    program = built("vae")
    assert repr(program) == nn.Module.__repr__(program)


def test_programs_without_a_guide():
    implicit = dgm.Implicit(event_shape=2, prior=dgm.Normal(2), generator=nn.Linear(2, 2))
    assert equations(implicit) == ["p(z) [x = f(z)]"]
    assert equations(dgm.VAE(dgm.Normal(2), dgm.Normal(3, nn.Linear(2, 6)))) == ["p(z) p(x | z)"]


def test_a_chain_is_not_run():
    """A thousand steps, or a thousand pixels, would take seconds."""
    calls = []
    for program in (diffusion(2, num_steps=1000), continuous(2), pixelcnn(2)):
        calls.clear()
        for module in program.modules():
            module.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
        str(program)
        assert 0 < len(calls) < 100


def test_what_is_read_as_a_python_value_is_a_parent_of_all_after_it():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        scale = 2.0 if a > 0 else 1.0
        pyro.sample("c", dist.Normal(b, scale))
        pyro.sample("d", dist.Normal(b.item(), 1.0))

    assert [factor.parents for factor in dgm.formula(model).joint] == [(), (), ("a", "b"), ("a", "b")]


def test_an_improper_prior_is_not_drawn_from():
    def model():
        a = pyro.sample("a", dist.ImproperUniform(dist.constraints.simplex, (2,), (3,)).to_event(1))
        b = pyro.sample("b", dist.ImproperUniform(dist.constraints.positive, (), ()))
        pyro.sample("x", dist.Normal(a.sum() * b, 1.0), obs=torch.tensor(0.0))

    found = dgm.formula(model)
    assert [factor.parents for factor in found.joint] == [(), (), ("a", "b")]
    assert found.joint[0].event_shape == (2, 3)


class HalfWritten(dgm.Program):
    event_shape = torch.Size((2,))


class Mistaken(HalfWritten):
    def joint(self, name, value=None, given=None):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return pyro.sample(name, dist.Normal(z[..., None], torch.ones(2)).to_event(1), obs=value)

    def posterior(self, name, value, given=None):
        raise ValueError("a mistake of its own")


def test_print_of_a_program_whose_statements_fail_says_why():
    assert str(HalfWritten()) == (
        "HalfWritten, whose statements fail: NotImplementedError: HalfWritten must define "
        "joint(name, value=None, given=None)"
    )
    assert str(Mistaken()).endswith("ValueError: a mistake of its own")
    assert Mistaken()._repr_latex_() is None
    with pytest.raises(ValueError, match="a mistake of its own"):
        Mistaken().formula()


def test_rows_of_given_stand_for_their_first():
    program = CASES["normal-given-open"].build()
    _, given = CASES["normal-given-open"].draw(program, 4)
    assert program.formula(given) == program.formula(given[:1])


def test_a_lazy_network_takes_the_shape_it_is_given():
    assert dgm.Normal(2, nn.LazyLinear(4)).given_shape is None
    vae = dgm.VAE(dgm.Normal(2), dgm.Normal(3, nn.LazyLinear(6)), dgm.Normal(2, nn.LazyLinear(4)))
    assert vae.likelihood.given_shape == (2,)
    assert vae.sample(4).shape == (4, 3)
