"""The site's interactive page computes what the package does: its networks in JavaScript beside PyTorch's, in node."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from scripts import load_script

import dgm_pyro as dgm

DOCS = Path(__file__).parent.parent / "docs"
NETWORKS = DOCS / "_static" / "interactive" / "networks.js"
TOLERANCE = 1e-9  # both reckon in double precision, from the same weights of single precision

PROGRAM = """
const { Decoder, Denoiser, Network, moments, draw } = require(process.argv[1]);
const given = JSON.parse(require("fs").readFileSync(0, "utf8"));
const { decoder, denoiser, schedule, levels, x, posterior } = given.exported;
const p = new Decoder(decoder, levels), chain = new Denoiser(denoiser, schedule, levels, 8);
console.log(JSON.stringify({
  first: Array.from(Network.unpack(x.values).slice(0, 64)),
  mean: Array.from(Network.unpack(posterior.mean.values)),
  decoded: given.z.map((z) => Array.from(p.decode(z))),
  expected: given.z.map((z) => Array.from(moments(p.decode(z), p.grid).mean)),
  noised: given.t.map((t) => Array.from(chain.noised(given.x0, t, given.noise))),
  denoised: given.t.map((t) => {
    const xt = chain.noised(given.x0, t, given.noise), denoised = chain.denoise(xt, t);
    const back = chain.reverse(xt, t, denoised);
    return [denoised.mean, denoised.variance, back.mean, back.scale].map((v) => Array.from(v));
  }),
  drawn: given.uniforms.map((u) => Array.from(draw(p.decode([0, 0]), Array(64).fill(u)))),
}));
"""


@pytest.fixture(scope="module")
def programs():
    torch.manual_seed(0)
    export, data = load_script("docs/interactive/export.py"), dgm.data.load("digits", "test")
    vae, diffusion = export.a_vae(data), export.a_diffusion(data)
    with torch.no_grad():
        for parameter in (*vae.parameters(), *diffusion.parameters()):  # some start as zeros, and would hide an error
            parameter.add_(0.1 * torch.randn_like(parameter))
    exported = json.loads(json.dumps(export.content(vae, diffusion, data)))
    return vae.double().eval(), diffusion.double().eval(), data, exported


@pytest.fixture(scope="module")
def answers(programs):
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    _, diffusion, data, exported = programs
    torch.manual_seed(1)
    given = {
        "z": torch.randn(5, 2, dtype=torch.float64).mul(2).tolist(),
        "x0": diffusion.clean(data.x[3]).flatten().tolist(),
        "noise": torch.randn(64, dtype=torch.float64).tolist(),
        "t": [1, 2, 25, 49, 50],
        "uniforms": [0.0, 0.5, 0.999999],
    }
    asked = json.dumps(given | {"exported": exported})
    done = subprocess.run(
        [node, "-e", PROGRAM, str(NETWORKS)], input=asked, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return given, {name: torch.tensor(value, dtype=torch.float64) for name, value in json.loads(done.stdout).items()}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_tensors_survive_the_export(programs, answers):
    vae, _, data, _ = programs
    assert torch.equal(answers[1]["first"], data.x[0].flatten().double())
    with torch.no_grad():
        expected = vae.encoder(data.x).base_dist.loc
    torch.testing.assert_close(answers[1]["mean"].reshape(-1, 2), expected, rtol=1e-5, atol=1e-5)  # single precision


def test_the_decoder_is_the_packages(programs, answers):
    vae, _, data, _ = programs
    given, computed = answers
    with torch.no_grad():
        p = vae.likelihood(torch.tensor(given["z"], dtype=torch.float64)).base_dist.probs  # (5, 1, 8, 8, levels)
    close(computed["decoded"].reshape(5, data.levels, 64), p.flatten(1, 3).movedim(-1, 1))
    close(computed["expected"], (p * torch.arange(data.levels)).sum(-1).flatten(1))


def test_draws_are_quantiles_of_the_levels(programs, answers):
    vae, _, _, _ = programs
    given, computed = answers
    with torch.no_grad():
        cumulated = vae.likelihood(torch.zeros(1, 2, dtype=torch.float64)).base_dist.probs.cumsum(-1).reshape(64, -1)
    for u, drawn in zip(given["uniforms"], computed["drawn"], strict=True):
        first, last = ((cumulated <= u + within).sum(-1) for within in (-TOLERANCE, TOLERANCE))
        assert ((first <= drawn) & (drawn <= last)).all()


def test_the_chain_is_the_packages(programs, answers):
    _, diffusion, _, _ = programs
    given, computed = answers
    t, batch = torch.tensor(given["t"]), (len(given["t"]), 1, 8, 8)
    x0 = torch.tensor(given["x0"], dtype=torch.float64).expand(len(t), -1).reshape(batch)
    noise = torch.tensor(given["noise"], dtype=torch.float64).reshape(1, 1, 8, 8)
    with torch.no_grad():
        q = diffusion.noised(x0, t).base_dist
        x_t = q.loc + q.scale * noise
        denoised = diffusion.denoise(x_t, t)
        back = diffusion.reverse(x_t, t, denoised).base_dist
    close(computed["noised"].reshape(batch), x_t)
    for actual, expected in zip(
        computed["denoised"].unbind(1), (denoised.x0, denoised.variance, back.loc, back.scale), strict=True
    ):
        close(actual.reshape(batch), expected)
