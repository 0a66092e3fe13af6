"""Three labels per class of the 8x8 digits, and all the others without: what the unlabeled ones are worth."""

import torch

import dgm_pyro as dgm
from dgm_pyro.networks import MLP
from dgm_pyro.objectives import SemiSupervised


def classifier():
    return dgm.Categorical((), 10, MLP((64,), 10, (64,)))


def scaled(data):
    return data.x.flatten(1).float() / 8 - 1


def test_digits_without_labels_make_the_classifier_better():
    """M2 (Kingma et al. 2014) from the classifier that the labels alone give: right answers gained, datum by datum.

    Two draws of the labels, 360 test digits each. The gain must be above four of its standard errors.
    """
    digits, test = dgm.data.load("digits"), dgm.data.load("digits", "test")
    x, x_test, gains = scaled(digits), scaled(test), []
    for seed in range(2):
        torch.manual_seed(seed)
        of_class = [(digits.y == label).nonzero()[:, 0] for label in range(10)]
        rows = torch.cat([each[torch.randperm(len(each))[:3]] for each in of_class])
        options = {"validation": None, "progress": False, "compile": False}
        alone = dgm.Discriminative(classifier())
        dgm.fit(alone, dgm.Data(x[rows], digits.y[rows]), epochs=100, **options)

        inner = dgm.VAE(
            dgm.Normal(4),
            dgm.Normal(64, MLP((4,), 64, (64,), num_classes=10), scale_type="shared", initial_scale=0.4),
            dgm.Normal(4, MLP((64,), 8, (64,))),
        )
        program = dgm.Labeled(dgm.Categorical((), 10), inner, classifier())
        program.classifier.network.load_state_dict(alone.classifier.network.state_dict())
        # The labeled tenth of each batch: every label 5 times an epoch.
        every = torch.cat([x, x[rows].repeat(5, 1)])
        labels = torch.cat([torch.full((len(x),), -1), digits.y[rows].repeat(5)])
        data = dgm.Data(every, labels, num_classes=10)
        dgm.fit(program, data, SemiSupervised(weight=5.0), epochs=14, lr=3e-3, **options)
        right = program.classifier(x_test).probs.argmax(-1) == test.y
        gains.append(right.double() - (alone.classify(x_test) == test.y).double())
    gain = torch.cat(gains)
    assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5
