"""A program computes in the precision of its own parameters, whatever torch's default is."""

import pytest
import torch
from programs import CASES, once_per_part, precision

import dgm_pyro as dgm
from dgm_pyro import representations

SIZE = 3


def in_precision(value, dtype):
    if isinstance(value, tuple):
        return tuple(in_precision(part, dtype) for part in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def answers(case, dtype, default):
    """What a program of ``dtype`` draws, scores, encodes and imputes under a default dtype, every time from a seed."""
    with precision(default):
        program = case.build(dtype=torch.float32).to(dtype).eval()
        x, given = in_precision(case.draw(program, SIZE, dtype=torch.float32), dtype)
        uses = {
            "sample": lambda: program.sample(SIZE, given),
            "log_weights": lambda: program.log_weights(x, given, num_particles=2),
        }
        if program.tractable:
            uses["log_prob"] = lambda: program.log_prob(x, given)
        else:
            uses["elbo"] = lambda: dgm.objectives.elbo(program, x, given).value
        if has_code(program):
            uses |= code_uses(program, x, given)
        if program.variable == "x" and x.dim() > 1 and not isinstance(program, dgm.OneHot) and not own_latents(program):
            mask = torch.arange(x[0].numel()).reshape(x.shape[1:]) < x[0].numel() // 2
            few = {"num_particles": 4, "num_temperatures": 2, "num_leapfrog": 1}
            uses["impute"] = lambda: dgm.infer.impute(program, x, mask, 2, given, **few)
        found = {}
        for name, use in uses.items():
            torch.manual_seed(0)
            found[name] = use().detach()
        return found


def has_code(program):
    try:
        return bool(representations.codes(program))
    except ValueError:
        return False


def own_latents(program):
    """Whether the likelihood has latents of its own, so that `impute` has no method."""
    return isinstance(program, dgm.VAE) and isinstance(program.likelihood, dgm.Dequantized)


def code_uses(program, x, given):
    uses = {
        "encode": lambda: representations.encode(program, x, given),
        "decode": lambda: representations.decode(
            program, representations.encode(program, x, given, draw=True), given, draw=True
        ),
    }
    if not representations.is_discrete(program):
        uses["interpolate"] = lambda: representations.interpolate(program, x, x.flip(0), 3, given=given)
        if tuple(representations.encode(program, x, given).shape[1:]) == (2,):
            one = None if given is None else given[:1]
            uses["grid"] = lambda: representations.grid(program, 2, given=one)
    return uses


@pytest.mark.parametrize("name", once_per_part(CASES))
def test_the_default_precision_changes_no_answer(name):
    case, found = CASES[name], {}
    for dtype, other in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        found[dtype], usual = answers(case, dtype, other), answers(case, dtype, dtype)
        for use, answer in usual.items():
            assert found[dtype][use].dtype == answer.dtype, use
            assert answer.dtype == dtype or not answer.is_floating_point(), use
            torch.testing.assert_close(
                found[dtype][use], answer, rtol=1e-4, atol=1e-4, msg=lambda m, use=use: f"{use}: {m}"
            )
    if "log_prob" in usual:
        one, other = (found[dtype]["log_prob"] for dtype in (torch.float32, torch.float64))
        torch.testing.assert_close(other.float(), one, rtol=1e-3, atol=1e-3)
