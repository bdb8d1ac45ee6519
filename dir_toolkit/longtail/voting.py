"""Uncertainty voting: several heads with increasing weight on rare labels; the most certain head predicts."""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import instance, one_of, require, shaped, whole
from .._state import SoundModule
from ..errors import DirToolkitWarning
from ..labels.bins import Bins, continuous
from ..labels.density import LabelDensity
from ..labels.grid import Windows
from ..labels.soft_labels import limits
from ..labels.weights import LDS
from .model import LongTailModel
from .readouts import GaussianReadout, LongTailOutput
from .rows import one_per_row

__all__ = ["VotingModel", "VotingOutput"]

_MOST_HEADS = 100


class VotingOutput(NamedTuple):
    """The output of a :class:`VotingModel` with M heads for a batch.

    Attributes:
        loss: (), the mean of the heads' losses. It is NaN without labels.
        scores: (N, M, ...), the scores of each head, as in :class:`LongTailOutput`.
        prediction: (N,), the prediction of the most certain head, in label units.
        features: (N, num_features).
        distribution: (N, B), the distribution of the most certain head; (N, 0) for Gaussian heads.
        residual: (N, M, B) or (N, M, 0), the residuals of each head.
        spread: (N, M), the predicted standard deviation of each head, in label units.
        most_certain: (N,) int64, the head with the smallest spread.
    """

    loss: Tensor
    scores: Tensor
    prediction: Tensor
    features: Tensor
    distribution: Tensor
    residual: Tensor
    spread: Tensor
    most_certain: Tensor


torch.utils._pytree._register_namedtuple(VotingOutput, serialized_type_name="dir_toolkit.VotingOutput")


class VotingModel(SoundModule):
    r"""Uncertainty voting: heads are trained with increasing weight on rare labels; the most certain one predicts.

    Head m of M has the exponent

    .. math:: \tau_m = m / (M - 1), \qquad m = 0, \dots, M - 1

    and a single head has the exponent 0. The loss of a Gaussian head is :math:`q(y)^{-\tau_m}` times the negative
    log-likelihood, with a mean weight of one. Here q is the smoothed label density, as in :class:`~dir_toolkit.LDS`.
    A head over bins is trained with its logits adjusted by :math:`\tau_m` times the log of the training prior, so that
    it predicts under a prior between that of training and a uniform one. The loss is the mean over the heads. The
    paper has no heads over bins, and the authors' code sums the losses of Laplace heads.

    Train it with ``model(x, labels).loss``, as :class:`LongTailModel`. It has :meth:`criterion` and :meth:`interval`,
    but none of ``calibrate``, ``calibrate_intervals``, ``predict``, ``set_prior`` and ``save``. Keep its ``state_dict``
    instead. The heads are the models ``model.members`` of features (N, D), whose priors can be set.

    Args:
        backbone: a module from inputs to features (N, D).
        num_features: the number of features, D.
        bins: the label axis, which must be continuous.
        density: the counted density of the training labels over these bins.
        heads: the number of heads, M, from 1 to 100. One head is trained as a plain :class:`LongTailModel`.
        head: ``"gaussian"``, or a head over bins: ``"linear"``, ``"cosine"``, ``"affinity"``, ``"coral"``, ``"corn"``.
        kernel: the kernel that smooths q, as in :class:`~dir_toolkit.LDS`, for Gaussian heads. Heads over bins take
            ``prior_kernel`` instead.
        options: those of :class:`LongTailModel` and its readout, for every head, except for ``fds``. The model itself
            sets ``weights`` of Gaussian heads, and ``target_prior``, ``tau`` and ``adjust`` of heads over bins.
    Attributes:
        backbone, members: the backbone, and one :class:`LongTailModel` of features for each head.
    Shape:
        forward: x as for the backbone; labels, weight: (N,). Returns :class:`VotingOutput`.
    Units:
        those of :class:`LongTailModel`.
    Raises:
        as :class:`LongTailModel`. ValueError: ``heads`` is out of range, or an option is given that the model sets.
    Source:
        Jiang et al. 2023 (arXiv:2305.15178).

    >>> bins = Bins.uniform(0, 100, width=5)
    >>> density = LabelDensity(bins, torch.arange(20, 0, -1))
    >>> model = VotingModel(nn.Flatten(), 8, bins, density=density)
    >>> out = model(torch.zeros(4, 8), torch.tensor([3.0, 20.0, 50.0, 99.0]))
    >>> out.prediction.shape, out.spread.shape, [member.weights.power for member in model.members]
    (torch.Size([4]), torch.Size([4, 3]), [0.0, 0.5, 1.0])
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_features: int,
        bins: Bins,
        *,
        density: LabelDensity,
        heads: int = 3,
        head: Literal["gaussian", "linear", "cosine", "affinity", "coral", "corn"] = "gaussian",
        kernel: Windows | Literal["auto"] | None = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        instance(nn.Module, backbone=backbone)
        instance(LabelDensity, density=density)
        heads = whole("heads", heads, low=1, high=_MOST_HEADS)
        one_of("head", head, ("gaussian", "linear", "cosine", "affinity", "coral", "corn"))
        continuous(bins, "Classes have no order.")
        gaussian = head == "gaussian"
        fix = 'Call fds.attach(model.backbone, "output"), and train inside `with fds.labels(y):`.'
        require(options.get("fds") is None, "fds must be left out", got="one", fix=fix)
        for name in ("weights",) if gaussian else ("target_prior", "tau", "adjust"):
            got, fix = f"{name}={options.get(name)!r}", "VotingModel sets it for each head."
            require(name not in options, f"{name} must be left out", got=got, fix=fix)
        used = gaussian or (isinstance(kernel, str) and kernel == "auto")
        require(used, f'kernel must be left out for head="{head}"', got=repr(kernel), fix="Pass prior_kernel.")
        self.backbone, self.bins, self.kernel, self.num_features = backbone, bins, kernel, num_features

        def member(power: float) -> LongTailModel:
            own: dict[str, Any] = {"target_prior": "uniform", "tau": power, "adjust": "in_loss"}
            if gaussian:
                placing = {name: options[name] for name in ("outside", "missing") if name in options}
                weights = LDS(bins, kernel=kernel, scheme="inverse", power=power, **placing)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DirToolkitWarning)  # that a few labels dominate, which is intended
                    own = {"weights": weights.fit(density)}
            return LongTailModel(nn.Identity(), num_features, bins, density=density, head=head, **own, **options)

        self.members = nn.ModuleList([member(m / max(heads - 1, 1)) for m in range(heads)])

    def forward(self, x: Any, labels: Tensor | None = None, weight: Tensor | None = None) -> VotingOutput:
        if labels is None:
            require(weight is None, "weight needs labels", got="labels=None", fix="Use model(x, labels, weight).")
        features = self.backbone(x)
        shaped(("N", self.num_features), "one row per sample", features=features)
        of_heads = [member(features) for member in self.members]
        scores, residual = (torch.stack([getattr(out, name) for out in of_heads], 1) for name in ("scores", "residual"))
        spread = torch.stack([_spread(*pair) for pair in zip(self.members, of_heads, strict=True)], 1)
        most_certain, loss = spread.argmin(1), scores.new_full((), torch.nan)
        prediction, distribution = (
            _of_most_certain(torch.stack([getattr(out, name) for out in of_heads], 1), most_certain)
            for name in ("prediction", "distribution")
        )
        output = VotingOutput(loss, scores, prediction, features, distribution, residual, spread, most_certain)
        return output if labels is None else output._replace(loss=self.criterion(output, labels, weight))

    def criterion(self, output: VotingOutput, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """The mean loss of the heads, for an output of ``model(x)``.

        Args:
            weight: >= 0, one per sample, by which each head's own weights are multiplied.
        Shape:
            labels, weight: (N,). Returns ().
        Raises:
            as :meth:`LongTailModel.criterion`.
        """
        instance(VotingOutput, output=output)
        member: Any = self.members[0]
        shape = ("N", len(self.members), *member.readout.score_shape)
        shaped(shape, "as this model gives them", **{"output.scores": output.scores})
        samples = output.scores.shape[:1]
        labels = one_per_row("labels", labels, samples, output.scores)
        weight = None if weight is None else one_per_row("weight", weight, samples, output.scores)
        return torch.stack([self._loss(m, output, labels, weight) for m in range(len(self.members))]).mean()

    def _loss(self, m: int, output: VotingOutput, labels: Tensor, weight: Tensor | None) -> Tensor:
        """The loss of member ``m``."""
        member: Any = self.members[m]
        if weight is not None and member.weights is not None:
            index = member.bins.place(labels, member.outside, member.missing)
            weight = weight * member._own_weight(member._placed(labels, index), index)
        own = LongTailOutput(
            output.loss, output.scores[:, m], output.prediction, output.features, output.distribution,
            output.residual[:, m],
        )  # fmt: skip
        return member.criterion(own, labels, weight)

    def interval(self, output: VotingOutput, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """The central interval of the most certain head's distribution, not calibrated.

        Args:
            level: in (0, 1).
        Shape:
            Returns the lower and the upper end, (N,) each.
        Units:
            those of the label.
        Raises:
            TypeError: the output is not a VotingOutput. ValueError: the level lies outside (0, 1).
        """
        instance(VotingOutput, output=output)
        member: Any = self.members[0]
        gaussian = isinstance(member.readout, GaussianReadout)
        forecast = _of_most_certain(output.scores, output.most_certain) if gaussian else output.distribution
        lower, upper = member.readout._central(forecast, level)
        return (member.readout._held(lower), member.readout._held(upper)) if gaussian else (lower, upper)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the model except for its backbone. ``members`` have the rest."""
        return {"heads": len(self.members), "bins": self.bins, "kernel": self.kernel}


def _of_most_certain(values: Tensor, most_certain: Tensor) -> Tensor:
    """The values (N, ...) of the most certain head, out of the values (N, M, ...) of all heads."""
    return values[torch.arange(most_certain.shape[0], device=most_certain.device), most_certain]


def _spread(member: Any, output: LongTailOutput) -> Tensor:
    """The standard deviation of a head's distribution, (N,), without gradient, in label units."""
    with torch.no_grad():
        if isinstance(member.readout, GaussianReadout):
            return (member.readout.forecast(output.scores)[:, 1] / 2).exp()
        knots = limits(member.bins, output.distribution, ends=member.readout.ends)
        middle, widths = (knots[1:] + knots[:-1]) / 2, knots.diff()
        middle = middle - middle.mean()  # avoids cancellation far from zero
        shares = output.distribution.to(knots.dtype)
        # Not matrix products, which autocast would compute in half precision.
        mean = (shares * middle).sum(1)
        return ((shares * (middle.square() + widths.square() / 12)).sum(1) - mean.square()).clamp_min(0).sqrt()
