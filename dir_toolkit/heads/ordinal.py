"""Ordinal heads: one binary classifier per bin edge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad, softplus

from .._checks import length, same_device
from .._numerics import full_precision
from .._state import SoundModule
from ._features import checked_features, linear_scores

__all__ = ["CoralHead", "CornHead"]


class _OrdinalHead(SoundModule):
    """A logit for each of the C - 1 inner edges. The subclass turns them into log-probabilities of the C bins."""

    @torch.inference_mode(False)  # what is kept must serve training, too
    def __init__(self, num_features: int, num_classes: int, *, shared: bool) -> None:
        super().__init__()
        self.num_features = length("num_features", num_features)
        self.num_classes = length("num_classes", num_classes)
        self.weight = nn.Parameter(torch.empty(1 if shared else self.num_classes - 1, self.num_features))
        self.bias = nn.Parameter(torch.empty(self.num_classes - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, normal, so that logits differ by about one; a feature of zero has even shares."""
        nn.init.normal_(self.weight, std=self.num_features**-0.5)
        with torch.no_grad():
            above = torch.arange(self.num_classes - 1, 0, -1, dtype=torch.float64)  # bins above each edge
            self.bias.copy_(self._even(above))

    def forward(self, features: Tensor) -> Tensor:
        checked_features(features, self.num_features)
        same_device(weight=self.weight, features=features)
        with full_precision(features.device):
            return self._log_shares(linear_scores(features, self.weight, None))

    def _even(self, above: Tensor) -> Tensor:
        """The biases with which all bins have the same share."""
        raise NotImplementedError

    def _log_shares(self, projected: Tensor) -> Tensor:
        """Log-probabilities (N, C)."""
        raise NotImplementedError

    @property
    def settings(self) -> dict[str, Any]:
        """What the head was made with."""
        return {"num_features": self.num_features, "num_classes": self.num_classes}


class CoralHead(_OrdinalHead):
    r"""One direction for all inner edges: :math:`P(y > b) = \sigma(w \cdot z + \beta_b)` with falling :math:`\beta_b`.

    Its scores are the log-probabilities of the bins. The probability of a bin is the difference of two adjacent ones.
    The scores can replace logits. :func:`~dir_toolkit.losses.coral_loss` is the paper's.

    In the paper the biases are free, and it proves that they are ordered at the optimum. Here they are in order from
    the start, :math:`\beta_b = \beta_{b-1} - \mathrm{softplus}(g_b)`, so that no share is ever negative.

    Args:
        num_features: D.
        num_classes: C, the number of bins, in their order.
    Attributes:
        weight: (1, D), the direction w. bias: (C - 1,), :math:`\beta_0` and then :math:`g_1, g_2, \dots`
    Shape:
        forward: features (N, D). Returns (N, C), rows whose exponentials sum to one.
    Raises:
        TypeError: a size is not a whole number, or features are not real numbers. ValueError: a size is below 1.
        ShapeError: features are not (N, D).
    Source:
        Cao, Mirjalili and Raschka 2020 (arXiv:1901.07884).

    >>> CoralHead(2, 4)(torch.zeros(1, 2)).exp()
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]], grad_fn=<ExpBackward0>)
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__(num_features, num_classes, shared=True)

    def _even(self, above: Tensor) -> Tensor:
        logits = (above / above.flip(0)).log()  # as many bins lie above an edge as below its mirror image
        return torch.cat([logits[:1], (-logits.diff()).expm1().log()])

    def _log_shares(self, projected: Tensor) -> Tensor:
        gaps = self.bias[1:].to(projected.dtype)
        fall = pad(softplus(gaps).cumsum(0), (min(1, len(self.bias)), 0))
        logits = projected + self.bias[:1].to(projected.dtype) - fall  # (N, C - 1)
        above, below = pad(logsigmoid(logits), (1, 0)), pad(logsigmoid(-logits), (0, 1))
        # s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)) for the logits a and b of a bin's edges, and a - b = softplus(g).
        return above + below + pad(logsigmoid(gaps), (1, self.num_classes - 1 - len(gaps)))


class CornHead(_OrdinalHead):
    r"""One classifier per inner edge, conditional on the previous edge being exceeded:
    :math:`P(y > b \mid y > b - 1) = \sigma(w_b \cdot z + \beta_b)`.

    Its scores are the log-probabilities of the bins, which can replace logits:
    :math:`\log p_b = \log(1 - \sigma_b) + \sum_{j < b} \log \sigma_j`, without the first term for the last bin, which
    has no edge above it.

    The paper's loss sums binary cross-entropies over edges; an edge uses only samples beyond the previous one. For a
    sample in bin b these are its edges up to b, and their sum is :math:`-\log p_b`. So
    :func:`~dir_toolkit.losses.cross_entropy` of these scores is that loss; the paper divides the sum over a batch by
    the number of terms rather than by the number of samples.

    Args:
        num_features: D.
        num_classes: C, the number of bins, in their order.
    Attributes:
        weight: (C - 1, D). bias: (C - 1,).
    Shape:
        forward: features (N, D). Returns (N, C), rows whose exponentials sum to one.
    Raises:
        TypeError: a size is not a whole number, or features are not real numbers. ValueError: a size is below 1.
        ShapeError: features are not (N, D).
    Source:
        Shi, Cao and Raschka 2023 (arXiv:2111.08851).

    >>> CornHead(2, 4)(torch.zeros(1, 2)).exp()
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]], grad_fn=<ExpBackward0>)
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__(num_features, num_classes, shared=False)

    def _even(self, above: Tensor) -> Tensor:
        return above.log()

    def _log_shares(self, projected: Tensor) -> Tensor:
        logits = projected + self.bias.to(projected.dtype)  # (N, C - 1)
        return pad(logsigmoid(logits).cumsum(1), (1, 0)) + pad(logsigmoid(-logits), (0, 1))
