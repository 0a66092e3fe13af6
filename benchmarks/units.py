"""Units: five correlated Normals of standard deviations 0.1 to 100, as they are and 1e6 away from 0, by every family.

    python benchmarks/units.py [--quick]
    python benchmarks/units.py --rings

The truth is known: the mean log density of the test data under the Normal that made them. Each family is built by name
and trained with its defaults for a few epochs. Without standardization the same training is shown for comparison.
``--rings`` compares two scales instead: a spline flow on 2,000 points of rings, standardized to a standard deviation of
1 or as `build` does, after 15 epochs; mean and standard error over five seeds of the training.
"""

import argparse
import time

import torch

import dgm_pyro as dgm

SCALES = torch.logspace(-1, 2, 5, dtype=torch.float64)
FAMILIES = ("pixels", "made", "transformer", "realnvp", "maf", "nsf", "nsf-autoregressive", "vae", "diffusion",
            "diffusion-continuous")  # fmt: skip


def normal(correlation: float = 0.8) -> torch.distributions.MultivariateNormal:
    places = torch.arange(5)
    correlations = correlation ** (places - places.unsqueeze(-1)).abs().double()
    return torch.distributions.MultivariateNormal(torch.zeros(5).double(), correlations * SCALES.outer(SCALES))


SEEDS = 5


def rings() -> None:
    data, unseen = dgm.data.load("rings", num_data=2000), dgm.data.load("rings", "test")

    def unit_deviation() -> dgm.Program:
        return dgm.Standardized(dgm.build("nsf", data, standardize=False), data.x.mean(0), data.x.std(0))

    builders = {"a standard deviation of 1": unit_deviation, "the range of build": lambda: dgm.build("nsf", data)}
    for name, build in builders.items():
        nats = []
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            program = build()
            dgm.fit(program, data, epochs=15, seed=seed, progress=False)
            nats.append(dgm.evaluate(program, unseen).nats)
        values = torch.tensor(nats)
        print(f"{name}: {values.mean():.3f} +- {values.std() / SEEDS**0.5:.3f} nats (exact, a density)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two families, few epochs")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--rings", action="store_true", help="compare two scales on points of rings")
    options = parser.parse_args()
    if options.rings:
        rings()
        return
    torch.manual_seed(0)
    truth = normal()
    train, test = truth.sample((5000,)), truth.sample((2000,))
    exact = truth.log_prob(test).mean().item()
    independent = torch.distributions.Normal(0, SCALES).log_prob(test).sum(-1).mean()
    print(f"truth {exact:.2f} nats; the best independent features {independent:.2f}")
    families = ("maf", "vae") if options.quick else options.families.split(",")
    epochs = 5 if options.quick else options.epochs
    print("| family | kind | nats - truth | offset 1e6 | not standardized | seconds |")
    print("|---|---|---|---|---|---|")
    for name in families:
        start, found = time.perf_counter(), []
        for offset, standardize, dtype in (
            (0.0, True, torch.float32),
            (1e6, True, torch.float64),
            (0.0, False, torch.float32),
        ):
            torch.manual_seed(0)
            data, unseen = (dgm.Data((part + offset).to(dtype)) for part in (train, test))
            program = dgm.build(name, data, standardize=standardize)
            try:
                dgm.fit(program, data, epochs=epochs, progress=False)
                evidence = dgm.evaluate(program, unseen, num_samples=64, num_particles=PARTICLES.get(name, 1))
                found.append(f"{evidence.nats - exact:+.2f}")
            except ArithmeticError:
                found.append("not finite")
        print(f"| {name} | {evidence.kind} | {' | '.join(found)} | {time.perf_counter() - start:.0f} |", flush=True)


PARTICLES = {"vae": 100}

if __name__ == "__main__":
    main()
