"""Networks of a part of x: what is not seen is not read."""

import torch
from torch import nn

from dgm_pyro.networks import ColumnReader, ObservedInput


class Inputs(nn.Module):
    """What the network is given."""

    def forward(self, inputs, *given):
        return inputs


def test_what_is_not_seen_enters_as_zero():
    seen = torch.tensor([[1.0, 0.0]])
    levels = ObservedInput(2, Inputs(), levels=5)(torch.tensor([[4, 4]]), seen)
    assert torch.equal(levels, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
    image = ObservedInput((1, 2, 1), Inputs())(torch.tensor([[[[3.0], [7.0]]]]), seen.reshape(1, 1, 2, 1))
    assert torch.equal(image, torch.tensor([[3.0, 0.0, 1.0, 0.0]]))


def test_a_category_is_hidden_with_all_its_inputs():
    network = ObservedInput(2, Inputs(), reader=ColumnReader([3, None]))
    x = torch.tensor([[2.0, 0.5], [2.0, 0.5]])
    found = network(x, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert torch.equal(found, torch.tensor([[0.0, 0.0, 1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.5, 0.0, 1.0]]))
