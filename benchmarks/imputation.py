"""Imputation at 30 % missing at random: two models trained on what was observed, beside three of scikit-learn.

    python benchmarks/imputation.py [--tables diabetes,wine,cancer] [--splits 3]

Rows miss values in training, validation and test alike. RMSE is over the missing values of the test rows, in units of
their column's standard deviation. The log-likelihood is that of the missing values given the observed ones, in nats
per missing value: of a VAE log p(x) - log p(x_obs), each by 1,000 particles; of a chain in any order the mean over 30
orders of the missing values, which bounds it from below; of the others a Normal around their value, its scale that of
their errors on the validation rows.
"""

import argparse
import functools
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from torch import Tensor

import dgm_pyro as dgm
from dgm_pyro.families.anyorder import AnyOrderDistribution
from dgm_pyro.networks import MLP, ObservedInput
from dgm_pyro.program import log_mean_exp

TABLES = {"diabetes": load_diabetes, "wine": load_wine, "cancer": load_breast_cancer}
METHODS = ("mean", "neighbors", "iterative", "VAE", "any order")
Parts = list[tuple[Tensor, Tensor]]  # x and where it was observed


def by_sklearn(name: str, parts: Parts) -> tuple[float, float]:
    rows = [np.where(mask, x, np.nan) for x, mask in parts]
    makers = {
        "mean": [SimpleImputer],
        "neighbors": [lambda k=k: KNNImputer(n_neighbors=k) for k in (3, 5, 10, 20)],
        "iterative": [lambda: IterativeImputer(max_iter=30, random_state=0)],
    }
    found = []
    for make in makers[name]:
        model = make().fit(rows[0])
        errors = [(torch.from_numpy(model.transform(row)) - x)[~mask]
                  for row, (x, mask) in zip(rows[1:], parts[1:], strict=True)]  # fmt: skip
        filled = [torch.from_numpy(model.transform(row)) - x for row, (x, _) in zip(rows[1:], parts[1:], strict=True)]
        found.append((errors[0].square().mean(), errors[1], filled))
    _, errors, (valid, test) = min(found, key=lambda each: each[0])
    missing = [~mask for _, mask in parts[1:]]
    scale = torch.stack([valid[missing[0][:, i], i].square().mean().sqrt() for i in range(valid.shape[1])])
    log_p = torch.distributions.Normal(0, scale).log_prob(test)[missing[1]].mean()
    return errors.square().mean().sqrt().item(), log_p.item()


def vae(train: dgm.Data, latent_size: int) -> dgm.Program:
    return dgm.build("vae", train, latent_size=latent_size, likelihood="normal", hidden=(128,))


def any_order(train: dgm.Data, width: int, dropout: float) -> dgm.Program:
    size = train.event_shape.numel()
    network = lambda outputs: ObservedInput(size, MLP((2 * size,), outputs, (width,), dropout=dropout))  # noqa: E731
    return dgm.AnyOrder(dgm.Normal(size, network))


VAES = [functools.partial(vae, latent_size=size) for size in (2, 4, 8)]
CHAINS = [functools.partial(any_order, width=width, dropout=dropout) for width, dropout in ((32, 0.0), (128, 0.5))]


def missing_of_vae(program: dgm.Program, x: Tensor, mask: Tensor) -> Tensor:
    whole, observed = (
        dgm.evaluate(program, data, num_particles=1000).values for data in (dgm.Data(x), dgm.Data(x, mask=mask))
    )
    return whole - observed


@torch.no_grad()
def missing_of_chain(program: dgm.Program, x: Tensor, mask: Tensor) -> Tensor:
    """The log-probability of what `dgm.infer.impute` draws: the observed values come first in each order."""
    torch.manual_seed(0)
    keys = torch.rand(30, *x.shape)
    terms = AnyOrderDistribution(program, torch.where(mask, keys, keys + 1), None).terms(x)
    return log_mean_exp(torch.where(mask, 0.0, terms).sum(-1))


def by_model(
    makers: Sequence[Callable[[dgm.Data], dgm.Program]],
    objective: str,
    log_p_missing: Callable[[dgm.Program, Tensor, Tensor], Tensor],
    parts: Parts,
) -> tuple[float, float]:
    """The best on validation of these models and two weight decays."""
    train, valid, test = (dgm.Data(x.float(), mask=mask) for x, mask in parts)
    found = []
    for make in makers:
        for decay in (0.0, 0.3):
            torch.manual_seed(0)
            program = make(train)
            options = {"epochs": 500, "early_stopping": 30, "lr_schedule": "constant", "weight_decay": decay}
            dgm.fit(program, train, objective, validation=valid, progress=False, **options)
            found.append((dgm.evaluate(program, valid, num_particles=100).nats, program))
    program = max(found, key=lambda each: each[0])[1]
    drawn = dgm.infer.impute(program, test.x, test.mask, num_samples=64, num_temperatures=30)
    errors = (drawn.mean(0) - parts[2][0])[~test.mask]
    log_p = log_p_missing(program, parts[2][0].float(), test.mask).sum() / (~test.mask).sum()
    return errors.square().mean().sqrt().item(), log_p.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--missing", type=float, default=0.3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"| table | number | {' | '.join(METHODS)} |\n|{'---|' * (2 + len(METHODS))}")
    for name in options.tables.split(","):
        x = torch.from_numpy(TABLES[name]().data)
        x = (x - x.mean(0)) / x.std(0)
        scores = []
        for seed in range(options.splits):
            torch.manual_seed(seed)
            order, cut, mask = torch.randperm(len(x)), len(x) // 5, torch.rand(x.shape) > options.missing
            rows = order[2 * cut :], order[cut : 2 * cut], order[:cut]
            parts = [(x[part], mask[part]) for part in rows]
            scores.append([
                *(by_sklearn(method, parts) for method in METHODS[:3]),
                by_model(VAES, "iwae:20", missing_of_vae, parts),
                by_model(CHAINS, "elbo", missing_of_chain, parts),
            ])  # fmt: skip
        for i, number in enumerate(("RMSE", "nats per missing value")):
            each = np.array(scores)[:, :, i]
            cells = [f"{a:.3f} ± {b:.3f}" for a, b in zip(each.mean(0), each.std(0), strict=True)]
            print(f"| {name} | {number} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
