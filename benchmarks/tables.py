"""Tables of mixed columns: models of columns beside a Gaussian, a Gaussian mixture and zuko's NSF.

    python benchmarks/tables.py [--tables diabetes,wine,cancer] [--models "columns, chain"] [--splits 3]

The tables come with scikit-learn; the class of wine and breast cancer is one more column, a category. Each split has
60 % of the rows to train on, 20 % to choose settings and epochs on, and 20 % to test. A number is log p(x) in nats per
row: of a mass of the integer columns times a density of the others. Models of densities alone see the integers plus
uniform noise, and their mean log density over 20 draws of the noise bounds the same number from below.
"""

import argparse
import warnings
from collections.abc import Callable

import numpy as np
import torch
import zuko
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.mixture import GaussianMixture
from torch import Tensor

import dgm_pyro as dgm
from dgm_pyro.networks import MLP, ColumnMADE, ColumnReader, ObservedInput

DRAWS = 20


def diabetes() -> tuple[Tensor, dict[str, object]]:
    data = load_diabetes(scaled=False)
    kinds: dict[str, object] = dict.fromkeys(data.feature_names, "real")
    kinds |= {"age": ("integer", 0, 100), "sex": ("category", 2), "s1": "count", "s6": "count"}
    x = torch.from_numpy(data.data).float()
    x[:, 1] -= 1
    return x, kinds


def wine() -> tuple[Tensor, dict[str, object]]:
    data = load_wine()
    kinds: dict[str, object] = dict.fromkeys(data.feature_names, "positive")
    kinds |= {"magnesium": "count", "proline": "count", "class": ("category", 3)}
    return torch.from_numpy(np.column_stack([data.data, data.target])).float(), kinds


def cancer() -> tuple[Tensor, dict[str, object]]:
    data = load_breast_cancer()
    kinds: dict[str, object] = dict.fromkeys(map(str, data.feature_names), "real")
    kinds |= {"class": ("category", 2)}
    return torch.from_numpy(np.column_stack([data.data, data.target])).float(), kinds


TABLES = {"diabetes": diabetes, "wine": wine, "cancer": cancer}
Parts = list[Tensor]


# -- densities of dequantized rows -------------------------------------------------------------------------------------


class Dequantizing:
    """Rows as densities see them: integers plus uniform noise, all standardized by the training rows."""

    def __init__(self, kinds: dict[str, object], train: Tensor):
        self.integers = torch.tensor([kind not in ("real", "positive") for kind in kinds.values()])
        noisy = self.noisy(train)
        self.shift, self.scale = noisy.mean(0), noisy.std(0)

    def noisy(self, x: Tensor) -> Tensor:
        return x.double() + torch.where(self.integers, torch.rand(x.shape).double(), 0.0)

    def __call__(self, x: Tensor) -> Tensor:
        return (self.noisy(x) - self.shift) / self.scale

    def score(self, log_prob, x: Tensor) -> float:
        draws = torch.stack([torch.as_tensor(log_prob(self(x))) for _ in range(DRAWS)])
        return draws.mean().item() - self.scale.log().sum().item()


def mixtures(parts: Parts, seen: Dequantizing, most: int) -> float:
    """A Gaussian mixture of 1 to ``most`` components, its covariances and their ridge chosen on validation."""
    train, valid, test = parts
    rows, found = seen(train).numpy(), []
    for components in range(1, most + 1):
        for kind in ("full", "tied", "diag"):
            for ridge in (1e-6, 1e-3, 1e-2, 1e-1):
                model = GaussianMixture(components, covariance_type=kind, reg_covar=ridge, random_state=0, n_init=2)
                found.append((seen.score(model.fit(rows).score_samples, valid), model))
    best = max(found, key=lambda each: each[0])[1]
    return seen.score(best.score_samples, test)


def zuko_nsf(parts: Parts, seen: Dequantizing) -> float:
    train, valid, test = parts
    found = []
    for hidden, decay in (((64, 64), 0.0), ((64, 64), 0.1), ((16,), 0.0)):
        torch.manual_seed(0)
        flow = zuko.flows.NSF(train.shape[1], transforms=3, hidden_features=hidden)
        found.append((_fitted(flow, decay, train, valid, seen), flow))
    return _scored(max(found, key=lambda each: each[0])[1], seen, test)


def _fitted(flow: zuko.lazy.Flow, decay: float, train: Tensor, valid: Tensor, seen: Dequantizing) -> float:
    """Train until 15 epochs in a row do not help on validation; the best score there, whose weights are kept."""
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3, weight_decay=decay)
    best, kept, worse = -float("inf"), dict(flow.state_dict()), 0
    while worse < 15:
        for batch in seen(train).float()[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            (-flow().log_prob(batch).mean()).backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
            optimizer.step()
        now, worse = _scored(flow, seen, valid), worse + 1
        if now > best:
            best, worse, kept = now, 0, {name: value.clone() for name, value in flow.state_dict().items()}
    flow.load_state_dict(kept)
    return best


@torch.no_grad()
def _scored(flow: zuko.lazy.Flow, seen: Dequantizing, x: Tensor) -> float:
    return seen.score(lambda u: flow().log_prob(u.float()).double(), x)


# -- models of columns -------------------------------------------------------------------------------------------------


def small_chain(data: dgm.Data, kinds: dict[str, object]) -> dgm.Program:
    """A chain over the columns by one hidden layer, most of it dropped."""
    shift, scale = data.x.mean(0), data.x.std(0)
    table = dgm.Columns(kinds, shift=shift, scale=scale)
    reader = ColumnReader(table.categories, (), shift, scale)
    network = lambda size: ColumnMADE(reader, size // len(kinds), (128,), dropout=0.5)  # noqa: E731
    return dgm.Autoregressive(dgm.Columns(kinds, network, shift=shift, scale=scale))


def small_any_order(data: dgm.Data, kinds: dict[str, object]) -> dgm.Program:
    """A chain in any order by one hidden layer, most of it dropped."""
    shift, scale = data.x.mean(0), data.x.std(0)
    reader = ColumnReader(dgm.Columns(kinds, shift=shift, scale=scale).categories, (), shift, scale)
    size = reader.out_features + len(kinds)
    network = lambda outputs: ObservedInput(  # noqa: E731
        len(kinds), MLP((size,), outputs, (128,), dropout=0.5), reader=reader
    )
    return dgm.AnyOrder(dgm.Columns(kinds, network, shift=shift, scale=scale))


SMALL = {"small-made": small_chain, "small-any-order": small_any_order}


def columns(parts: Parts, kinds: dict[str, object], names: tuple[str, ...]) -> float:
    """The best on validation of the models of those names and of two weight decays."""
    train, valid, test = (dgm.Data(part) for part in parts)
    found = []
    for name in names:
        for decay in (0.0, 0.3):
            torch.manual_seed(0)
            program = SMALL[name](train, kinds) if name in SMALL else dgm.build(name, train, columns=kinds)
            options = {
                "epochs": 400,
                "early_stopping": 30,
                "lr_schedule": "constant",
                "weight_decay": decay,
                "lr": 2e-3,
            }
            dgm.fit(program, train, validation=valid, batch_size=32, progress=False, **options)
            particles = {} if program.tractable else {"num_particles": 300 if name == "vae" else 30}
            found.append((dgm.evaluate(program, valid, **particles).nats, program, particles))
    _, program, particles = max(found, key=lambda each: each[0])
    return dgm.evaluate(program, test, **particles).nats


MODELS: dict[str, Callable[[Parts, dict[str, object], Dequantizing], float]] = {
    "Gaussian": lambda parts, kinds, seen: mixtures(parts, seen, 1),
    "Gaussian mixture": lambda parts, kinds, seen: mixtures(parts, seen, 6),
    "zuko NSF": lambda parts, kinds, seen: zuko_nsf(parts, seen),
    "columns, independent": lambda parts, kinds, seen: columns(parts, kinds, ("pixels",)),
    "columns, VAE": lambda parts, kinds, seen: columns(parts, kinds, ("vae",)),
    "columns, chain": lambda parts, kinds, seen: columns(parts, kinds, ("made", "small-made")),
    "columns, any order": lambda parts, kinds, seen: columns(parts, kinds, ("any-order", "small-any-order")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--models", action="append", choices=MODELS, help="default all of them")
    parser.add_argument("--splits", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    names = options.models or list(MODELS)
    print(f"| table | rows | {' | '.join(names)} |\n|{'---|' * (2 + len(names))}")
    for name in options.tables.split(","):
        x, kinds = TABLES[name]()
        scores = []
        for seed in range(options.splits):
            torch.manual_seed(seed)
            order, cut = torch.randperm(len(x)), len(x) // 5
            parts = [x[order[2 * cut :]], x[order[cut : 2 * cut]], x[order[:cut]]]
            seen = Dequantizing(kinds, parts[0])
            scores.append([MODELS[model](parts, kinds, seen) for model in names])
        mean, spread = np.mean(scores, 0), np.std(scores, 0)
        cells = " | ".join(f"{a:.2f} ± {b:.2f}" for a, b in zip(mean, spread, strict=True))
        print(f"| {name} | {len(x)} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
