"""MNIST with 100 labels: a VAE on all images (M1), on its codes a labeled VAE (M2), and a network that they teach.

    DGM_DATA=folder python benchmarks/semi_supervised.py

M1 is trained once, without labels. Its encoder sees each training image distorted (turned, sheared, scaled, shifted,
anew each time) and has to say of which image: what the distortion changes cannot be told, so it does not enter z. The
bound holds whatever the encoder has seen (Im et al. 2017, arXiv 1511.06406). M2 is Kingma et al. 2014 (arXiv 1406.5298)
over the codes: p(y) p(u) p(z | u, y), a classifier q(y | z), labels enumerated where they are unknown. Then a network
of the pixels takes for labels what M1 + M2 is sure of, later what it is itself sure of, and learns them on distorted
images (Xie et al. 2020, arXiv 1911.04252).

Three draws of 10 labels per class; accuracy on all 10,000 test images. Training sees no test image, and no label but
the 100. One thread, so that the processor time is what it took.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgm_pyro as dgm
from dgm_pyro import representations
from dgm_pyro.experiments import runs
from dgm_pyro.networks import MLP, ConvEncoder
from dgm_pyro.objectives import SemiSupervised

SHAPE, CLASSES = (1, 28, 28), 10
STRONG = {"turn": 25.0, "scale": 0.15, "shear": 0.4, "shift": 2.0}
MILD = {"turn": 12.0, "scale": 0.1, "shear": 0.15, "shift": 1.0}
SURE = 0.9


def distorted(x: Tensor, turn: float, scale: float, shear: float, shift: float) -> Tensor:
    """Each image under its own affine map: degrees, shares of the size, tangents, pixels, uniform up to these."""

    def up_to(most: float) -> Tensor:
        return most * (2 * torch.rand(len(x)) - 1)

    angle, height = up_to(torch.pi * turn / 180), x.shape[-1] / 2
    top = [(1 + up_to(scale)) * angle.cos(), -angle.sin() + up_to(shear), up_to(shift / height)]
    bottom = [angle.sin(), (1 + up_to(scale)) * angle.cos(), up_to(shift / height)]
    maps = torch.stack([torch.stack(row, -1) for row in (top, bottom)], 1)
    return F.grid_sample(x, F.affine_grid(maps, list(x.shape), align_corners=False), align_corners=False)


@dgm.register
class Distorted(nn.Module):
    """A network of bits that in training sees each image distorted."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.in_shape = network, SHAPE

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.get_default_dtype())
        return self.network(2 * (distorted(x, **STRONG) if self.training else x) - 1)


def m1(latent: int) -> dgm.VAE:
    encoder = Distorted(ConvEncoder(SHAPE, 2 * latent, (32, 64), blocks=0))
    return dgm.VAE(
        dgm.Normal(latent),
        dgm.Bernoulli(SHAPE, MLP((latent,), 784, (400,))),
        dgm.Normal(latent, encoder, initial_scale=0.1),
    )


def m2(features: int, latent: int = 8) -> dgm.Labeled:
    """The VAE of M1's codes. q(u | z) does not read y, so it runs once for all ten labels."""
    return dgm.Labeled(
        dgm.Categorical((), CLASSES),
        dgm.VAE(
            dgm.Normal(latent),
            dgm.Normal(features, MLP((latent,), 2 * features, (128,), num_classes=CLASSES)),
            dgm.Normal(latent, MLP((features,), 2 * latent, (128,))),
        ),
        dgm.Categorical((), CLASSES, MLP((features,), CLASSES, (256,), dropout=0.2)),
    )


def bits(x: Tensor) -> Tensor:
    return (x >= 128).to(torch.uint8)


def mildly(x: Tensor, copies: int) -> Tensor:
    """The bits of the images, and of ``copies - 1`` distortions of each."""
    return torch.cat([bits(x), *(bits(distorted(x.float(), **MILD)) for _ in range(copies - 1))])


def accuracy(classifier: Any, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return right(torch.cat([classifier(part).probs for part in x.split(1000)]), y)


@torch.no_grad()
def averaged(answer: Callable[[Tensor], Tensor], x: Tensor, views: int) -> Tensor:
    """p(y | x) of the bits of each image, averaged with those of ``views - 1`` distortions of it."""
    seen = mildly(x, views).split(len(x))
    return torch.stack([torch.cat([answer(part) for part in view.split(1000)]) for view in seen]).mean(0)


def right(probabilities: Tensor, y: Tensor) -> float:
    return (probabilities.argmax(-1) == y).double().mean().item()


def supervised(data: dgm.Data, network: nn.Module, epochs: int, **options: Any) -> dgm.Categorical:
    """A classifier trained on the labels alone."""
    classifier = dgm.Categorical((), CLASSES, network)
    dgm.fit(
        dgm.Discriminative(classifier), data, epochs=epochs, validation=None, device="cpu", progress=False, **options
    )
    return classifier


def taught(p: Tensor, images: Tensor, few: Tensor, y: Tensor, rounds: int) -> dgm.Categorical:
    """A network on the pixels that learns what p, ``(N, classes)``, is sure of, then what it is itself sure of."""
    network = ConvEncoder(SHAPE, CLASSES, (16, 32), blocks=0, levels=2, dropout=0.2)
    for _ in range(rounds):
        top = p.max(-1)
        sure = top.values > SURE
        x = torch.cat([images[sure], few.repeat(20, 1, 1, 1)]).float()
        labels = torch.cat([top.indices[sure], y.repeat(20)])
        twice = torch.cat([bits(distorted(x, **MILD)) for _ in range(2)])
        data = dgm.Data(twice, labels.repeat(2), levels=2, num_classes=CLASSES)
        student = supervised(data, network, epochs=1, batch_size=128, lr=2e-3).eval()
        p = averaged(lambda part, q=student: q(part).probs, images, 5)
    return student


def without_m1(train: dgm.Data, test: dgm.Data, rows: Tensor, seed: int, rounds: int) -> float:
    """Accuracy where the first answers are those of a network trained on the labels and their distorted copies."""
    assert train.y is not None
    assert test.y is not None
    torch.manual_seed(seed)
    few, y = train.x[rows], train.y[rows]
    copies = dgm.Data(mildly(few, 120), y.repeat(120), levels=2, num_classes=CLASSES)
    network = ConvEncoder(SHAPE, CLASSES, (16, 32), blocks=0, levels=2, dropout=0.2)
    teacher = supervised(copies, network, epochs=5, batch_size=50).eval()
    student = taught(averaged(lambda x: teacher(x).probs, train.x, 5), train.x, few, y, rounds)
    return right(averaged(lambda x: student(x).probs, test.x, 9), test.y)


def train_m1(folder: Path, data: dgm.Data, latent: int, epochs: int, seed: int) -> dgm.VAE:
    torch.manual_seed(seed)
    program = m1(latent)
    options = {"epochs": epochs, "batch_size": 128, "lr": 2e-3}
    start = time.process_time()
    history = dgm.fit(program, data, validation=None, seed=seed, device="cpu", **options)
    seconds = round(time.process_time() - start)
    runs.write(folder, program, runs.record_of("m1", "mnist", history, seed=seed, seconds=seconds, **options))
    return program


def codes(program: dgm.VAE, x: Tensor) -> Tensor:
    return representations.encode(program, x, batch_size=1000)


def one_draw(
    program: dgm.VAE, train: dgm.Data, test: dgm.Data, seed: int, views: int, epochs: int, rounds: int
) -> dict[str, float]:
    """Accuracies with the 100 labels of one draw, by what has learned from them."""
    assert train.y is not None
    assert test.y is not None
    torch.manual_seed(seed)
    rows, found = (train.keep_labels(100, seed).y >= 0).nonzero()[:, 0], dict[str, float]()
    few, copies = train.x[rows], 120
    y = train.y[rows].repeat(copies)

    for name, count in (("conv net, labels alone", 1), ("conv net, labels alone, distorted copies", copies)):
        images = dgm.Data(mildly(few, count), train.y[rows].repeat(count), levels=2, num_classes=CLASSES)
        network = ConvEncoder(SHAPE, CLASSES, (16, 32), blocks=0, levels=2, dropout=0.2)
        alone = supervised(images, network, epochs=600 // count, batch_size=50)
        found[name] = accuracy(alone, bits(test.x), test.y)

    start = time.process_time()
    labeled, z_test = codes(program, mildly(few, copies)), codes(program, bits(test.x))
    found["linear probe of M1"] = representations.probe(labeled[: len(few)], y[: len(few)], z_test, test.y)
    found["linear probe of M1, distorted copies"] = representations.probe(labeled, y, z_test, test.y)

    z = torch.cat([codes(program, mildly(part, views)) for part in train.x.split(10_000)])
    z, y = torch.cat([z, labeled]), torch.cat([torch.full((len(z),), -1), y])
    both = m2(z.shape[1])
    # The classifier starts from the labels: were it to start from nothing, the classes would be whatever helps p(z).
    assert both.classifier is not None
    supervised(dgm.Data(labeled, y[-len(labeled) :]), both.classifier.network, epochs=2, batch_size=128)
    found["its classifier before M2"] = accuracy(both.classifier.eval(), z_test, test.y)
    data = dgm.Data(z, y, num_classes=CLASSES)
    options = {"epochs": epochs, "batch_size": 256, "lr": 2e-3}
    dgm.fit(both, data, SemiSupervised(weight=5.0), validation=None, seed=seed, device="cpu", compile=False, **options)
    found["M1 + M2"] = accuracy(both.classifier, z_test, test.y)

    def answer(x: Tensor) -> Tensor:
        return both.classifier(codes(program, x)).probs

    found["M1 + M2, averaged over distorted views"] = right(averaged(answer, test.x, 9), test.y)
    found["seconds"] = round(time.process_time() - start)
    student = taught(averaged(answer, train.x, 5), train.x, few, train.y[rows], rounds)
    found["a network taught by M1 + M2"] = accuracy(student, bits(test.x), test.y)
    views = averaged(lambda x: student(x).probs, test.x, 9)
    found["the same, averaged over distorted views"] = right(views, test.y)
    found["seconds with the network"] = round(time.process_time() - start)
    found["a network taught without M1 and M2"] = without_m1(train, test, rows, seed, rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/semi-supervised"), help="folder for M1 and the numbers")
    parser.add_argument("--data-dir", default=None, help="default: the environment variable DGM_DATA")
    parser.add_argument("--latent", type=int, default=20, help="features of M1's code")
    parser.add_argument("--m1-epochs", type=int, default=8)
    parser.add_argument("--m2-epochs", type=int, default=6)
    parser.add_argument("--views", type=int, default=2, help="codes of each unlabeled image: its own, others distorted")
    parser.add_argument("--rounds", type=int, default=10, help="trainings of the network, each on new answers")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the labels, from seed 0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    train, test = (dgm.data.load("mnist", split, data_dir=arguments.data_dir) for split in ("train", "test"))
    if not (arguments.out / runs.RECORD).is_file():
        images = dgm.Data(bits(train.x), levels=2, name="mnist")
        train_m1(arguments.out, images, arguments.latent, arguments.m1_epochs, seed=0)
    program, record = runs.read(arguments.out)
    print(f"M1: {record.options['seconds']} s of one core", flush=True)
    table: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        found = one_draw(program, train, test, seed, arguments.views, arguments.m2_epochs, arguments.rounds)
        print(f"draw {seed}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)
        for name, value in found.items():
            table.setdefault(name, []).append(value)
    (arguments.out / "accuracies.json").write_text(json.dumps(table, indent=1))
    print(f"{'100 labels, 10,000 test images':<44}{'mean':>8}   draws")
    for name, values in table.items():
        if not name.startswith("seconds"):
            print(f"{name:<44}{100 * sum(values) / len(values):>7.2f}%   " + " ".join(f"{100 * v:.2f}" for v in values))


if __name__ == "__main__":
    main()
