"""The base of the estimators: checks of settings, held-out rows, training and prediction."""
# ruff: noqa: N803, N806, since scikit-learn's tables are called X

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.base import BaseEstimator
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from ..._checks import number, one_of, problem, require, whole, without_tensors
from ...errors import NonFiniteLossError
from ...experiment.training.optimization import Optimization
from ...experiment.training.runtime import Runtime, chosen_device
from ...experiment.training.steps import Steps
from ...heads.affinity import AffinityHead
from ...labels.bins import Bins
from ...labels.density import LabelDensity
from ...labels.weights import LDS, Scheme
from ...longtail import LongTailModel
from ...longtail.readouts import ScoreReadout
from ._blended import counted, usual_sigma
from ._columns import Columns, unlike
from ._members import MemberHead, Members

_ROWS = 8192  # rows at a time in prediction, which needs rows times bins numbers
_MEMBER_HEADS = {
    "linear": None,
    "regression": 1,
    "gaussian": 2,
}  # numbers of outputs of the heads whose members can be averaged
_BATCHES = 20  # batches per epoch with batch_size="auto"
_BATCH_SIZES = (32, 512)

Fit = TypeVar("Fit", bound=Callable[..., Any])


def all_or_nothing(method: Fit) -> Fit:
    """Decorate a ``fit`` so that it drops all attributes of an earlier fit, and restores them if it fails."""

    @functools.wraps(method)
    def fit(self: Any, *args: Any, **kwargs: Any) -> Any:  # messages name it
        before, own = dict(vars(self)), vars(self)
        for name in before:
            if name.endswith("_"):
                del own[name]
        try:
            return method(self, *args, **kwargs)
        except BaseException:
            own.clear()
            own.update(before)
            raise

    return fit  # type: ignore[return-value]


@dataclass
class Rows:
    """The rows of a fit: inputs, labels, weights, and the training and validation rows of each member (K)."""

    inputs: np.ndarray
    labels: np.ndarray
    weight: np.ndarray
    own: np.ndarray
    held: np.ndarray


class LongTailEstimator(BaseEstimator):
    """The common part of the estimators: their settings, networks, training and calibration."""

    hidden: Sequence[int]
    loss: str | Callable[..., Tensor] | None
    weights: Scheme | None
    tau: float | Literal["auto"]
    adjust: Literal["after", "in_loss"]
    members: int
    epochs: int
    batch_size: int | Literal["auto"]
    lr: float
    weight_decay: float
    validation_fraction: float
    patience: int | None
    random_state: Any
    device: str
    verbose: bool
    model_: LongTailModel

    def _checked(self, X: Any, y: Any, sample_weight: Any, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The checked columns, labels and weights of rows with positive weight. Other rows are ignored."""
        X, y = self._table(X, y=y, ensure_min_samples=2, **options)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        present = weight > 0
        require(present.any(), "sample_weight must be positive for at least one row", got="zeros")
        return _dense(X)[present], y[present], weight[present]

    def _table(self, X: Any, **options: Any) -> Any:
        if "y" in options:  # scikit-learn would read what is behind a mask
            options["y"] = without_tensors(options["y"], "y")
        return validate_data(self, X, dtype=np.float64, accept_sparse="csr", **options)

    def _check_settings(self, head: str) -> None:
        """Raise at a setting that is out of range or does not suit the head."""
        one_of("adjust", self.adjust, ("after", "in_loss"))
        bins = head not in ("regression", "gaussian")
        if not isinstance(self.tau, str):
            rule = f'tau must be "auto" (not used) with head={head!r}, which has no bins'
            require(bins, rule, got=repr(self.tau))
            number("tau", self.tau, low=0)
        else:
            one_of("tau", self.tau, ("auto",))
            if bins and self.adjust == "in_loss":
                rule = 'tau must be a number with adjust="in_loss", since it is needed before training'
                raise problem(rule, got='"auto"', fix='Use adjust="after".')
        number("validation_fraction", self.validation_fraction, low=0, high=0.5, open_low=True)
        whole("members", self.members, low=1)
        averages = self.members == 1 or head in _MEMBER_HEADS
        require(averages, "members must be 1 with heads whose scores are not linear", got=f"{self.members}, {head=}")
        if self.patience is not None:
            whole("patience", self.patience, low=1)
        if self.weights is not None:
            one_of("weights", self.weights, ("inverse", "sqrt_inverse", "effective_number", "dense"))

    def _optimization(self, rows: int) -> Optimization:
        size: Any = self.batch_size
        if isinstance(size, str):
            one_of("batch_size", size, ("auto",))
            size = int(np.clip(rows // _BATCHES, *_BATCH_SIZES))
        return Optimization(epochs=self.epochs, batch_size=size, lr=self.lr, weight_decay=self.weight_decay)

    def _rows(
        self,
        random: np.random.RandomState,
        columns: np.ndarray,
        labels: np.ndarray,
        weight: np.ndarray,
        bins: Bins,
        judged: bool,
    ) -> Rows:
        """Split the rows into training and held-out rows, and fit the columns."""
        members = min(self.members, len(labels) // 2)
        held = np.zeros((members, len(labels)), dtype=bool)
        if judged and members == 1:
            held[0, validation_rows(random, labels, self.validation_fraction, bins)] = True
            fix = "Pass patience=None and a number as tau to train without held-out rows."
            require(held.any(), "y must hold a label twice, to validate on", got="each once", fix=fix)
        elif judged:
            held = folds(random, labels, members) == np.arange(members)[:, None]
        own = ~held if judged else np.ones_like(held)
        trained = own.any(0)
        weight = weight / weight[trained].mean()
        self.columns_ = Columns(columns[trained], weight[trained])
        inputs = self.columns_(columns)
        for one_own, one_held in zip(own, held, strict=True):
            one_held &= ~unlike(inputs, one_own, one_held)
        return Rows(inputs, labels, weight, own, held)

    def _fit_model(
        self,
        rows: Rows,
        bins: Bins,
        head: str,
        scheme: Scheme | None,
        optimization: Optimization,
        runtime: Runtime,
        **options: Any,
    ) -> tuple[LongTailModel, Tensor]:
        """A trained model, and the scores of held-out rows (M, ...) in the order of the rows."""
        scores_bins = head not in ("regression", "gaussian")
        count, trained = len(rows.own), rows.own.any(0)
        density = counted(bins, rows.labels[trained], rows.weight[trained])
        smooth = density.smooth("auto")
        lds, weight = None, rows.weight
        if scheme is not None:
            if scores_bins:  # no warning of bins that are empty because rows were held out
                smooth = LabelDensity(bins, np.maximum(smooth.counts, 1.0))
            lds = LDS(bins, kernel=None, scheme=scheme).fit(smooth)
            weight = weight * lds.sample_weight(rows.labels)
        spreads = scores_bins and options.get("loss") in (None, "cross_entropy", "squared_emd")
        if spreads and not bins.categorical:
            options.setdefault("sigma", usual_sigma(bins, density))
        if head == "regression":
            options["prior_kernel"] = None  # the density is smoothed already

        if isinstance(self.hidden, str) or not isinstance(self.hidden, Sequence):
            rule = "hidden must be a tuple of whole numbers"
            raise problem(rule, got=repr(self.hidden), fix="Use (64,) for one layer.", error=TypeError)
        widths = [rows.inputs.shape[1], *(whole("hidden", width, low=1) for width in self.hidden)]
        with torch.inference_mode(False), torch.enable_grad():
            with runtime.seeded("network", head):
                members = Members(count, widths)
                model = LongTailModel(
                    members,
                    widths[-1],
                    bins,
                    density=density if scores_bins else smooth,
                    head=head,  # type: ignore[arg-type]
                    weights=lds,  # for the prior; the loss gets them multiplied by the weights of rows
                    **options,
                )
                if head in _MEMBER_HEADS:
                    model.head = MemberHead(count, widths[-1], _MEMBER_HEADS[head] or len(bins))
            model = model.to(runtime.device, torch.float32)
            scores = self._train(model, rows, weight, optimization, runtime)
            # In float64 a prediction does not depend on other rows of the batch. On the CPU a pickle can be loaded
            # anywhere.
            model = model.eval().cpu().double()
            if isinstance(model.head, MemberHead):
                members.side_by_side, model.num_features = True, count * widths[-1]
                with runtime.seeded("average"):  # initial weights are not used
                    model.head = model._mark(model.head.average())
        return model, scores

    def _train(
        self, model: LongTailModel, rows: Rows, weight: np.ndarray, optimization: Optimization, runtime: Runtime
    ) -> Tensor:
        """Train, and return the scores of held-out rows. With patience each member keeps its best weights."""
        device, count = runtime.device, len(rows.own)
        inputs, all_weights = (torch.from_numpy(values).float().to(device) for values in (rows.inputs, weight))
        labels, own = (torch.from_numpy(values).to(device) for values in (rows.labels, rows.own))
        trained = own.any(0).nonzero().squeeze(1)
        own = own * all_weights * (count / own[:, trained].sum(0).clamp_min(1).float().mean())
        by_row = own.t().contiguous()  # a gather of rows is faster than one of columns
        held = [torch.from_numpy(np.flatnonzero(one)).to(device) for one in rows.held]
        longest = max(map(len, held))
        padded = torch.stack([torch.cat([one, trained[:1].expand(longest - len(one))]) for one in held])
        fused = device.type in ("cpu", "cuda") or None
        steps = Steps(model, optimization, len(trained), runtime, fused=fused)
        parameters = [*model.backbone.parameters(), *model.head.parameters()]  # those that each member has for itself
        best, best_scores = torch.full((count,), math.inf, device="cpu"), None
        best_weights = [parameter.detach().clone() for parameter in parameters]
        history: list[dict[str, float]] = []
        self.best_epochs_ = np.full(count, optimization.epochs)

        target = model.readout.target(model._placed(labels, model.bins.place(labels, model.outside, model.missing)))
        if target.is_floating_point() and target.ndim > 1:
            target = target.float()  # shares of bins

        def scores_of(x: Tensor) -> Tensor:
            raw = model.head(model.backbone(x))
            return raw if isinstance(model.readout, ScoreReadout) else model.readout(raw, raw, raw).scores

        def loss_of(place: int, indices: Tensor) -> Tensor:
            batch = trained.index_select(0, indices)
            x, weights = inputs.index_select(0, batch), by_row.index_select(0, batch).t().flatten()
            repeated = target.index_select(0, batch).repeat(count, *[1] * (target.ndim - 1))
            loss = model.readout.loss_of(scores_of(x), repeated, weights)
            diverse = isinstance(model.head, AffinityHead) and model.readout.loss_name == "affinity_loss"
            return loss + model.head.diversity() if diverse else loss  # type: ignore[operator]

        def judged() -> tuple[Tensor, Tensor]:
            """The loss of each member on its validation rows, and the scores of these rows, (K, M, ...)."""
            with torch.no_grad():
                scores = scores_of(inputs[padded])
                scores = scores.view(count, longest, *scores.shape[1:])
                parts = zip(scores, held, strict=True)
                losses = [model.readout.loss_of(one[: len(row)], target[row], all_weights[row]) for one, row in parts]
            return torch.stack(losses).cpu(), scores

        for epoch in range(1, optimization.epochs + 1):
            total = torch.zeros((), dtype=torch.float64, device=device)
            order = torch.randperm(len(trained), generator=runtime.generator("order", epoch), device="cpu").to(device)
            for step in steps.epoch(epoch - 1, order, loss_of):
                total += step.labels * step.loss
            row = {"epoch": epoch, "loss": total.item() / len(trained)}
            if longest:
                model.eval()
                losses, scores = judged()
                row["val_loss"] = losses.mean().item()
                model.train()
                better = losses < best if self.patience is not None else torch.ones_like(losses, dtype=torch.bool)
                if best_scores is None:
                    best_scores = scores.clone()
                best_scores[better] = scores[better]
                best = torch.where(better, losses, best)
                self.best_epochs_[better.numpy()] = epoch
                for old, new in zip(best_weights, parameters, strict=True):
                    old.view(count, -1)[better] = new.detach().view(count, -1)[better]
            history.append(row)
            if self.verbose:
                print(" ".join(f"{name} {value:.5g}" for name, value in row.items()), flush=True)
            if not all(map(math.isfinite, row.values())):
                fix = "Lower lr, or look for values of X far from all others."
                got = f"{row['loss']:g} in epoch {epoch}"
                raise problem("the loss must be finite", got=got, fix=fix, error=NonFiniteLossError)
            if self.patience is not None and longest and epoch - self.best_epochs_.max() >= self.patience:
                break
        self.history_ = history
        if best_scores is None:
            return torch.zeros(0, device="cpu")
        with torch.no_grad():
            for old, new in zip(best_weights, parameters, strict=True):
                new.copy_(old)
        scores = torch.cat([one[: len(row)] for one, row in zip(best_scores, held, strict=True)])
        return scores[torch.cat(held).argsort()].cpu().double()

    @torch.no_grad()
    def _read(self, inputs: np.ndarray, read: Callable[[Tensor], Tensor]) -> Tensor:
        """The results of ``read`` for the inputs of all rows."""
        return torch.cat([read(x) for x in torch.from_numpy(inputs).split(_ROWS)])

    def _predicted(self, X: Any, read: Callable[[Tensor], Tensor]) -> np.ndarray:
        check_is_fitted(self)
        X = _dense(self._table(X, reset=False))
        return self._read(self._inputs(X), read).numpy()

    def _inputs(self, X: np.ndarray) -> np.ndarray:
        return self.columns_(X)

    def _start(self) -> tuple[np.random.RandomState, Runtime]:
        random = check_random_state(self.random_state)
        return random, Runtime(chosen_device(self.device), seed=int(random.randint(2**31 - 1)))

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


def _dense(X: Any) -> np.ndarray:
    return X.toarray() if issparse(X) else X


def folds(random: np.random.RandomState, labels: np.ndarray, count: int) -> np.ndarray:
    """Stratified folds: each run of ``count`` rows in the order of labels has one row in each fold."""
    order = np.lexsort((random.random_sample(len(labels)), labels))
    fold = np.empty(len(labels), dtype=np.int64)
    for start in range(0, len(labels), count):
        run = order[start : start + count]
        fold[run] = random.permutation(count)[: len(run)]
    return fold


def validation_rows(random: np.random.RandomState, labels: np.ndarray, fraction: float, bins: Bins) -> np.ndarray:
    """Stratified validation rows: one of each run of rows in the order of labels. No class loses its last row."""
    order = np.lexsort((random.random_sample(len(labels)), labels))
    runs = np.array_split(order, max(1, min(len(labels) // 2, round(fraction * len(labels)))))
    rows = np.array([random.choice(run) for run in runs])
    if not bins.categorical:
        return rows
    left = np.delete(labels, rows)
    return rows[np.isin(labels[rows], left)]
