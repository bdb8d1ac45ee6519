"""From a number per row to a distribution over the bins of a label axis, as held-out rows show it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ...labels.bins import Bins

_FEWEST = 8  # rows of the narrowest window; each other one is twice as wide as the one before
_GROUPS = 8192  # of rows that windows are made of, where rows are more
_PIECES = 200  # that the errors of forecasts are cut into
_STEPS = 100  # of expectation-maximization


class Windows(nn.Module):
    """A head that tells how labels lie where a forecast lies.

    A window holds the rows whose forecasts are nearest: 8 of them, 16, 32, and so on up to all. Each window answers in
    two ways: with the labels of its rows, and with the errors of their forecasts, which are moved to the new forecast.
    The answers are averaged in those proportions under which the labels are likeliest, while no row belongs to its own
    windows. So labels that a forecast tells little of are looked up, and forecasts that are precise are believed.

    Args:
        forecasts: of rows that what forecasts was not trained on. labels, weight: of these rows; weights are positive.
        target: the labels spread over bins.
    Attributes:
        log_shares: (N, B), what the module says of the forecasts given, each row being left out.
    Shape:
        forecasts, labels, weight: (N,). target: (N, B). forward: (M, 1), forecasts. Returns (M, B), logarithms of
        shares.
    """

    forecasts: Tensor
    cumulative: Tensor
    errors: Tensor
    proportions: Tensor

    def __init__(self, forecasts: Tensor, labels: Tensor, weight: Tensor, target: Tensor, bins: Bins) -> None:
        super().__init__()
        self.bins = bins
        rows, order = len(forecasts), forecasts.argsort(stable=True)
        group = torch.arange(rows) // -(-rows // _GROUPS)  # of each row, in the order of forecasts
        groups = int(group[-1]) + 1
        self.register_buffer("forecasts", forecasts[order][group.diff(prepend=group.new_full((1,), -1)) > 0])
        self.sizes = [*(_FEWEST * 2**k for k in range(32) if _FEWEST * 2**k < groups), 2 * groups]

        error = labels - forecasts
        errors = np.quantile(error.numpy(), np.linspace(0, 1, _PIECES + 1))
        errors[[0, -1]] += np.array([-1, 1]) * max(np.ptp(errors) / 50, 1e-9 * float(np.ptp(bins.edges)))
        self.register_buffer("errors", torch.from_numpy(np.unique(errors)))
        piece = torch.searchsorted(self.errors[1:-1].contiguous(), error, right=True)
        pieces = nn.functional.one_hot(piece, len(self.errors) - 1)
        weight, target = (weight / weight.mean())[order], target[order]
        own = torch.cat([target, pieces.to(target)[order]], 1) * weight[:, None]
        sums = own.new_zeros(groups, own.shape[1]).index_add_(0, group, own)
        self.register_buffer("cumulative", nn.functional.pad(sums.cumsum(0), (0, 0, 1, 0)))

        parts = list(zip(*(values.split(_GROUPS) for values in (forecasts[order], own, target)), strict=True))
        likely = torch.cat([torch.stack([(one * t).sum(1) for one in self._answers(f, o)]) for f, o, t in parts], 1)
        share = likely.new_full((len(likely),), 1 / len(likely))
        for _ in range(_STEPS):
            of_each = share[:, None] * likely
            # A row for each answer keeps all of them alive, and with them the rarest labels.
            share = (of_each / of_each.sum(0).clamp_min(1e-300)) @ weight + 1
            share = share / share.sum()
        self.register_buffer("proportions", share)
        self.log_shares = torch.cat([self._log_shares(f, o) for f, o, _ in parts])[order.argsort()]

    def forward(self, forecasts: Tensor) -> Tensor:
        return self._log_shares(forecasts[:, 0].contiguous(), None)

    def _log_shares(self, forecasts: Tensor, own: Tensor | None) -> Tensor:
        total = forecasts.new_zeros(len(forecasts), len(self.bins))
        for share, answer in zip(self.proportions, self._answers(forecasts, own), strict=True):
            total = total + share * answer
        return total.clamp_min(1e-12).log()

    def _answers(self, forecasts: Tensor, own: Tensor | None) -> Iterator[Tensor]:
        """The shares (N, B) that each window tells in each of its ways, without what rows of its own add to it."""
        left, right = (torch.searchsorted(self.forecasts, forecasts, right=right) for right in (False, True))
        groups, bins = len(self.forecasts), len(self.bins)
        for size in self.sizes:
            low = ((left + right - size) // 2).clamp(0, groups - 1).minimum(left)
            high = ((left + right + size + 1) // 2).clamp(1, groups).maximum(right)
            inside = self.cumulative[high] - self.cumulative[low]
            inside = inside if own is None else (inside - own).clamp_min(0)
            yield _shares(inside[:, :bins])
            if size < groups:
                yield self._moved(_shares(inside[:, bins:]), forecasts)

    def _moved(self, shares: Tensor, forecasts: Tensor) -> Tensor:
        """Shares of the errors, as shares of the bins around each forecast; the end bins hold what lies beyond."""
        below = nn.functional.pad(shares.cumsum(1), (1, 0))
        error = self.bins.tensor("edges", forecasts)[1:-1] - forecasts[:, None]
        piece = torch.searchsorted(self.errors[1:-1].contiguous(), error, right=True)
        within = ((error - self.errors[piece]) / self.errors.diff()[piece]).clamp(0, 1)
        at = below.gather(1, piece).lerp(below.gather(1, piece + 1), within)
        return nn.functional.pad(nn.functional.pad(at, (1, 0)), (0, 1), value=1.0).diff(dim=1)


def _shares(sums: Tensor) -> Tensor:
    return sums / sums.sum(1, keepdim=True).clamp_min(1e-300)


class LogShares(nn.Module):
    """A head over shares of bins, (N, B), that gives their logarithms, (N, B).

    A little of the prior is mixed in, as much as a row counts among the held-out ones, so that no bin is impossible.
    """

    prior: Tensor

    def __init__(self, prior: Tensor, rows: int) -> None:
        super().__init__()
        self.register_buffer("prior", prior)
        self.share = 1 / (rows + 1)

    def forward(self, shares: Tensor) -> Tensor:
        return ((1 - self.share) * _shares(shares) + self.share * self.prior).log()
