"""A codebook finds the nearest vectors and follows their encodings, against the definitions computed by loops."""

import pytest
import torch

from dgm_pyro.networks import Codebook

pytestmark = pytest.mark.usefixtures("float64")


def codebook_of(vectors, **options):
    codebook = Codebook(*vectors.shape, **options)
    codebook.running.copy_(torch.cat((torch.ones(len(vectors), 1), vectors), 1))
    return codebook


def encodings(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_the_nearest_vector_is_found_and_a_vector_finds_itself():
    torch.manual_seed(0)
    vectors = 100 + 1e-9 * torch.randn(7, 3)  # apart by less than a matrix product can tell
    codebook = codebook_of(vectors)
    assert torch.equal(codebook.nearest(codebook.vectors), torch.arange(7))
    h = encodings(2, 5, 3)
    codebook = codebook_of(torch.randn(7, 3))
    k = codebook.nearest(h)
    for encoding, found in zip(h.reshape(-1, 3), k.flatten(), strict=True):
        squares = [((encoding - e) ** 2).sum() for e in codebook.vectors]
        assert found == min(range(7), key=squares.__getitem__)


def test_values_are_the_code_vectors_to_the_last_bit_and_gradients_pass_straight_through():
    torch.manual_seed(0)
    codebook, h, weight = codebook_of(torch.randn(4, 3)), encodings(6, 3), torch.randn(6, 3)
    z = codebook(h)
    assert torch.equal(z, codebook.vectors[codebook.nearest(h)])
    (weight * z).sum().backward()
    assert torch.equal(h.grad, weight)


def test_it_is_the_running_means():
    """N and m written out as sums over the steps, each step in two parts, by the assignments of that step."""
    torch.manual_seed(0)
    decay, start = 0.8, torch.randn(4, 2)
    codebook = codebook_of(start, decay=decay, dead_below=0.0)
    counts, sums = [torch.ones(4)], [start]
    for step in range(5):
        h = encodings(12, 2, seed=step)
        k = codebook.nearest(h)
        counts.append(torch.stack([(k == code).sum() for code in range(4)]))
        sums.append(torch.stack([h[k == code].sum(0) for code in range(4)]))
        for part in h.split(5):
            codebook(part)
        codebook.follow()
    shares = [decay**5, *((1 - decay) * decay ** (4 - step) for step in range(5))]
    count, total = (sum(s * each for s, each in zip(shares, every, strict=True)) for every in (counts, sums))
    torch.testing.assert_close(codebook.vectors, (total / count.unsqueeze(1)).detach())


def test_the_first_step_makes_every_code_a_mean_or_an_encoding_of_its_batch():
    torch.manual_seed(0)
    codebook, h = Codebook(16, 2), (50 + torch.randn(30, 2)).requires_grad_()
    k = codebook.nearest(h)
    codebook(h)
    codebook.follow()
    for code, vector in enumerate(codebook.vectors):
        mean = h[k == code].mean(0) if (k == code).any() else None
        near = [h, h if mean is None else mean.unsqueeze(0)]
        assert min((vector - each).norm(dim=-1).min() for each in near) < 1e-9
    assert len(codebook.nearest(h).unique()) > 6, "they are in use now"


def test_a_dead_code_is_reset_to_an_encoding_and_not_before():
    codebook = codebook_of(torch.tensor([[0.0], [100.0]]), decay=0.5, dead_below=0.2)
    h = torch.tensor([[-1.0], [1.0], [3.0]], requires_grad=True)
    for expected in ([2.0, 0.5], [2.5, 1.375]):  # the count of 0.25 is below a fifth of the mean, 1.375
        assert codebook.vectors[1] == 100
        codebook(h)
        codebook.follow()
        assert codebook.running[:, 0].tolist() == expected
    assert codebook.vectors[1].item() in (-1, 1, 3)


def test_nothing_moves_without_training():
    torch.manual_seed(0)
    for still in ("evaluation", "no gradient", "frozen", "no batch"):
        codebook, h = codebook_of(torch.randn(4, 2)), encodings(9, 2)
        before = codebook.vectors
        if still == "evaluation":
            codebook.eval()(h)
        elif still == "no gradient":
            with torch.no_grad():
                codebook(h)
        elif still == "frozen":
            codebook(h.detach())
        for _ in range(3):
            codebook.follow()
        assert torch.equal(codebook.vectors, before), still


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codes": 0}, "num_codes must be"),
        ({"decay": 1.0}, "decay must be a number between 0 and 1, got 1.0"),
        ({"dead_below": 1}, "dead_below must be a share of the mean, at least 0 and below 1, got 1"),
    ],
)
def test_options_that_make_no_codebook_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Codebook(**{"num_codes": 3, "num_features": 2, **options})


def test_a_code_that_is_never_used_keeps_its_vector():
    """Where none is reset: its running count decays, and would end in numbers without digits."""
    codebook = Codebook(2, 3, decay=0.5, dead_below=0.0)
    far = torch.tensor([[3.0, -0.5, 0.7], [-100.0, 0.0, 0.0]])
    codebook.running.copy_(torch.cat([torch.ones(2, 1), far], 1))
    for _ in range(300):
        codebook(torch.zeros(4, 3, requires_grad=True) + far[0])
        codebook.follow()
    torch.testing.assert_close(codebook.vectors, far)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_encodings_of_another_precision_get_the_codes_of_their_values(dtype):
    codebook = Codebook(4, 3)
    h = torch.randn(6, 3).to(dtype).requires_grad_()
    assert torch.equal(codebook.nearest(h), codebook.nearest(h.float()))
    codebook(h)
    codebook.follow()
    assert codebook.running.isfinite().all()
