r"""A codebook: vectors that replace the encodings nearest to them, and are running means of these.

Each of K vectors e_k in R^D is the running mean of the encodings that it replaced. With the n_k encodings h of a
training step that are nearest to e_k, and the decay :math:`\gamma`,

.. math::
    N_k \leftarrow \gamma N_k + (1 - \gamma)\, n_k, \qquad
    m_k \leftarrow \gamma m_k + (1 - \gamma) \sum_{h \to k} h, \qquad
    e_k = m_k / N_k.

A code is dead when its N_k falls below a share of the mean N. It is reset, with the mean N, to an encoding of the last
batch, which is drawn in proportion to its squared distance from its code: a code near existing ones would only split
their encodings. The codes start with so little weight that the first step sets all of them to means or encodings of its
own batch.

Quantization has no derivative. The *straight-through* gradient is that of the identity:
:math:`z = e_k + h - \mathrm{sg}(h)`, where sg(h) is h without a gradient.

Source: van den Oord et al. 2017 (arXiv 1711.00937), section 3.2 and appendix A.1; Razavi et al. 2019 (arXiv
1906.00446), equation 3. Resets: Dhariwal et al. 2020 (Jukebox, arXiv 2005.00341), section 3.1; their draws: Arthur and
Vassilvitskii 2007 (k-means++).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_pyro.checks import check_counts, check_dense, check_number
from dgm_pyro.registry import register

__all__ = ["Codebook"]

# The weight N of a code before training, nearly zero.
START = 1e-12


@register
class Codebook(nn.Module):
    """Encodings ``(*batch, D)`` to their nearest code vectors, of the same shape, with straight-through gradients.

    In training mode, encodings that require a gradient are recorded, and the next `follow` updates the codebook by
    them. `dgm.fit` calls `follow` after each step; your own training loop must call it after the optimizer's step.

    Args:
        num_codes: K.
        num_features: D, the size of a vector.
        decay: gamma of the running means.
        dead_below: a code is reset when its running count is below this share of the mean over all codes; 0 for never.

    Attributes:
        running: N_k and m_k of each code, ``(K, 1 + D)``.

    Raises:
        ValueError, TypeError: a number does not fit.

    >>> import torch, dgm_pyro as dgm
    >>> codebook = dgm.networks.Codebook(4, 2)
    >>> z = codebook(torch.randn(3, 5, 2))
    >>> bool((codebook.vectors[codebook.nearest(z)] == z).all())
    True
    """

    running: Tensor
    seen: Tensor
    fresh: Tensor

    def __init__(self, num_codes: int, num_features: int, *, decay: float = 0.99, dead_below: float = 0.01):
        super().__init__()
        check_counts(num_codes=num_codes, num_features=num_features)
        if not 0 < check_number(decay, "decay") < 1:
            raise ValueError(f"decay must be a number between 0 and 1, got {decay}")
        if not 0 <= check_number(dead_below, "dead_below") < 1:
            raise ValueError(f"dead_below must be a share of the mean, at least 0 and below 1, got {dead_below}")
        self.num_codes, self.num_features, self.decay, self.dead_below = num_codes, num_features, decay, dead_below
        self.register_buffer(
            "running", START * torch.cat((torch.ones(num_codes, 1), torch.randn(num_codes, num_features)), 1)
        )
        # Accumulated in the current step: n_k and the sum of the encodings, and encodings for dead codes.
        self.register_buffer("seen", torch.zeros(num_codes, 1 + num_features), persistent=False)
        self.register_buffer("fresh", torch.zeros(num_codes, num_features), persistent=False)

    @property
    def vectors(self) -> Tensor:
        """The code vectors e_k, ``(K, D)``."""
        return self.running[:, 1:] / self.running[:, :1]

    def nearest(self, h: Tensor) -> Tensor:
        """The index k of the code vector nearest to each h, ``(*batch, D)`` to integers ``(*batch,)``.

        Raises:
            TypeError, ValueError: h is no tensor, or its last dimension is not D.
        """
        return self.distances(h).argmin(-1)

    @torch.no_grad()
    def distances(self, h: Tensor) -> Tensor:
        """The distance of each h from each code vector, ``(*batch, D)`` to ``(*batch, K)``; exactly 0 where equal.

        Raises:
            TypeError, ValueError: as for `nearest`.
        """
        check_dense(h, "h")
        if h.shape[-1:] != (self.num_features,):
            raise ValueError(
                f"h has shape {tuple(h.shape)}, but the code vectors have size {self.num_features}: pass (*batch, D)"
            )
        # By differences, because a matrix product gives no exact 0 for equal vectors.
        flat = torch.cdist(self._flat_encodings(h), self.vectors, compute_mode="donot_use_mm_for_euclid_dist")
        return flat.reshape(*h.shape[:-1], self.num_codes)

    def forward(self, h: Tensor) -> Tensor:
        k, straight_through = self.nearest(h), h - h.detach()
        if self.training and straight_through.requires_grad:
            self._note_use(h, k)
        return F.embedding(k, self.vectors) + straight_through

    def _flat_encodings(self, h: Tensor) -> Tensor:
        """``(N, D)`` in the precision of the code vectors."""
        return h.detach().reshape(-1, self.num_features).to(self.running.dtype)

    @torch.no_grad()
    def _note_use(self, h: Tensor, k: Tensor) -> None:
        flat = self._flat_encodings(h)
        self.seen.index_add_(0, k.flatten(), F.pad(flat, (1, 0), value=1.0))
        edges = (flat - F.embedding(k.flatten(), self.vectors)).square().sum(-1).cumsum(0)
        places = torch.rand(self.num_codes, dtype=flat.dtype, device=h.device) * edges[-1]
        self.fresh.copy_(flat[torch.searchsorted(edges, places).clamp(max=flat.shape[0] - 1)])

    @torch.no_grad()
    def follow(self) -> None:
        """Update the codes by the encodings since the last call, and reset dead codes; without any, do nothing."""
        some = self.seen[:, :1].sum() > 0
        self.running.lerp_(self.seen, (1 - self.decay) * some.to(self.running.dtype))
        mean = self.running[:, :1].mean()
        dead = some & (self.running[:, :1] < self.dead_below * mean)
        self.running.copy_(torch.where(dead, mean * F.pad(self.fresh, (1, 0), value=1.0), self.running))
        # A code that is never used keeps its vector: without a floor, N and m would decay to denormal numbers.
        self.running.mul_((START / self.running[:, :1]).clamp(min=1.0))
        self.forget()

    def forget(self) -> None:
        """Drop the encodings since the last `follow`, such as those of a skipped step."""
        self.seen.zero_()
