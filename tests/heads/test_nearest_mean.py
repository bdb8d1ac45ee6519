from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from dir_toolkit.errors import DirToolkitWarning, LabelError, NotFittedError, ShapeError
from dir_toolkit.heads.nearest_mean import NearestMeanHead

METRICS = ("cosine", "euclidean")
each_metric = pytest.mark.parametrize("metric", METRICS)


def sample(seed: int = 0, n: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=generator)
    features = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return features + 2 * labels[:, None], labels


def fitted(metric: Any = "cosine", *batches: tuple[Tensor, Tensor]) -> NearestMeanHead:
    head = NearestMeanHead(4, 3, metric=metric).double()
    for features, labels in batches or [sample()]:
        head.update(features, labels)
    head.finish()
    return head


def naive(features: Tensor, train: Tensor, labels: Tensor, metric: str) -> Tensor:
    rows = []
    for z in features.tolist():
        row = []
        for c in range(3):
            members = [x for x, y in zip(train.tolist(), labels.tolist(), strict=True) if y == c]
            if not members:
                row.append(-math.inf)
                continue
            mean = [math.fsum(column) / len(members) for column in zip(*members, strict=True)]
            if metric == "cosine":
                product = math.fsum(a * b for a, b in zip(z, mean, strict=True))
                row.append(product / (math.hypot(*z) * math.hypot(*mean)))
            else:
                row.append(-math.fsum((a - b) ** 2 for a, b in zip(z, mean, strict=True)))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def assert_right(scores: Tensor, *arguments: Any) -> None:
    assert_close(scores, naive(*arguments), rtol=1e-12, atol=1e-12)


# ---- scores ----


def test_scores_are_those_worked_out_by_hand() -> None:
    features, labels = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 0, 1])
    query = torch.tensor([[3.0, 4.0]])  # means (2, 0) and (0, 5)
    for metric, expected in (("cosine", [0.6, 0.8]), ("euclidean", [-17.0, -10.0])):
        head = NearestMeanHead(2, 2, metric=metric)  # type: ignore[arg-type]
        head.update(features, labels)
        head.finish()
        assert_close(head(query), torch.tensor([expected]))
        assert_close(head(query.long()), torch.tensor([expected]))
    assert head.means.tolist() == [[2.0, 0.0], [0.0, 5.0]]
    assert head.count.tolist() == [2, 1]


@each_metric
def test_scores_equal_a_naive_loop(metric: Any) -> None:
    train, queries = sample(), sample(1)[0]
    head = fitted(metric)
    for n in (60, 1):
        assert_right(head(queries[:n]), queries[:n], *train, metric)
    with pytest.raises(AssertionError):
        assert_right(head(queries) + 1e-9, queries, *train, metric)
    with pytest.raises(AssertionError):
        assert_right(head(queries), queries, train[0], train[1].flip(0), metric)
    assert head(queries[:0]).shape == (0, 3)


@each_metric
def test_batches_and_their_order_do_not_matter(metric: Any) -> None:
    (features, labels), queries = sample(), sample(1)[0]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    batches = [(features[place], labels[place]) for place in order.split(7)]
    empty = (features[:0], labels[:0])
    assert_close(fitted(metric, empty, *batches)(queries), fitted(metric)(queries), rtol=1e-12, atol=1e-12)


def test_a_class_weighs_alike_however_often_it_is_seen() -> None:
    features, labels = sample()
    rare = torch.cat([features, features[labels == 1]]), torch.cat([labels, labels[labels == 1]])
    assert_close(fitted("cosine", rare).means, fitted().means, rtol=1e-12, atol=1e-12)
    assert fitted("cosine", rare).count.tolist()[1] == 2 * fitted().count.tolist()[1]


@each_metric
def test_gradients_reach_the_features_only(metric: Any) -> None:
    head, features = fitted(metric), sample(1, 5)[0].requires_grad_()
    assert gradcheck(head, (features,))
    assert list(head.parameters()) == []
    head.update(features, torch.arange(5) % 3)
    head.finish()
    assert not head.means.requires_grad


def test_distances_far_from_the_origin_keep_their_digits() -> None:
    features, labels = sample()
    head = NearestMeanHead(4, 3, metric="euclidean")
    head.update(features + 1000, labels)
    head.finish()
    expected = naive(features, features, labels, "euclidean").float()
    assert_close(head((features + 1000).float()), expected, rtol=1e-3, atol=1e-2)


@each_metric
def test_half_precision_and_autocast_give_float32_scores(metric: Any) -> None:
    head, features = fitted(metric).float(), sample(1)[0].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(features.bfloat16()).dtype == torch.float32
        inside = head(features)
    assert torch.equal(inside, head(features))


def test_distances_to_means_of_length_one_rank_as_cosines_do() -> None:
    """The paper's Euclidean distance; that to the means as they are ranks otherwise."""
    queries, head = sample(1)[0], fitted()
    unit = head.means / head.means.norm(dim=1, keepdim=True)
    assert torch.equal((-torch.cdist(queries, unit)).argmax(1), head(queries).argmax(1))
    assert not torch.equal(fitted("euclidean")(queries).argmax(1), head(queries).argmax(1))


# ---- update and finish ----


def test_finish_starts_over() -> None:
    head = fitted()
    second = sample(3)
    head.update(*second)
    assert_close(head.means, fitted().means)  # as they were until finish
    head.finish()
    assert_close(head.means, fitted("cosine", second).means)
    with pytest.raises(NotFittedError, match=r"^NearestMeanHead.finish: there must be samples, got none\. Call update"):
        head.finish()
    assert_close(head.means, fitted("cosine", second).means)


@each_metric
def test_a_class_without_samples_is_never_chosen_and_told_once(metric: Any) -> None:
    features, labels = sample()
    keep = labels != 1
    head = NearestMeanHead(4, 3, metric=metric).double()
    head.update(features[keep], labels[keep])
    with pytest.warns(DirToolkitWarning, match="1 of 3 classes have no sample and are never chosen: 1"):
        head.finish()
    assert_right(head(features), features, features[keep], labels[keep], metric)
    assert head(features)[:, 1].tolist() == [-math.inf] * 60
    assert not bool((head(features).argmax(1) == 1).any())
    head.update(features[keep], labels[keep])
    head.finish()  # says no more


def test_scores_before_finish_are_refused() -> None:
    head = NearestMeanHead(4, 3)
    head.update(*sample())
    message = r"^NearestMeanHead: the means must be computed before scores, got none\. Call update"
    with pytest.raises(NotFittedError, match=message):
        head(torch.zeros(1, 4))


def test_inputs_are_left_alone() -> None:
    features, labels = sample()
    before = features.clone(), labels.clone()
    fitted("cosine", (features, labels))(features)
    assert torch.equal(features, before[0])
    assert torch.equal(labels, before[1])


def test_means_that_the_buffer_cannot_hold_are_refused() -> None:
    for dtype, size in ((torch.float32, 1e39), (torch.float16, 1e5)):
        head = NearestMeanHead(4, 3).to(dtype)
        head.update(*sample())
        head.finish()
        before = copy.deepcopy(head.state_dict())
        features, labels = sample(2)
        features[labels == 1, 2] = size
        head.update(features, labels)
        with pytest.raises(
            ValueError, match=r"^NearestMeanHead.finish: means must be finite, got inf at index \[1, 2\]"
        ):
            head.finish()
        assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


@pytest.mark.parametrize(
    ("features", "labels", "error", "message"),
    [
        (
            torch.zeros(2, 4),
            torch.tensor([0, 3]),
            LabelError,
            r"labels must hold class indices from 0 to 2, got 3 at index \[1\]",
        ),
        (torch.zeros(2, 4), torch.tensor([-1, 0]), LabelError, r"got -1 at index \[0\] \(1 such values\)"),
        (
            torch.zeros(2, 4),
            torch.tensor([0.0, 1.0]),
            TypeError,
            r"labels must be integers, got dtype torch.float32\. Us",
        ),
        (torch.zeros(2, 4), torch.tensor([True, False]), TypeError, "labels must be integers, got dtype torch.bool"),
        (torch.zeros(2, 4), [0, 1], TypeError, "labels must be a torch.Tensor, got list"),
        (
            torch.zeros(2, 4),
            torch.tensor([[0], [1]]),
            ShapeError,
            r"labels must be \(2,\), one per sample, got shape \(2, 1\)\. Use labels.sq",
        ),
        (torch.zeros(2, 4), torch.tensor([0]), ShapeError, r"labels must be \(2,\), one per sample, got shape \(1,\)"),
        (torch.zeros(2, 5), torch.tensor([0, 1]), ShapeError, r"features must be \(N, 4\), got shape \(2, 5\)"),
        (torch.full((2, 4), math.nan), torch.tensor([0, 1]), ValueError, r"features must be finite, got nan at index"),
        (
            torch.zeros(2, 4),
            torch.zeros(2, device="meta").long(),
            ValueError,
            "must be on the same device, got cpu and",
        ),
    ],
)
def test_bad_batches_are_refused_and_change_nothing(
    features: Any, labels: Any, error: type[Exception], message: str
) -> None:
    head = NearestMeanHead(4, 3).double()
    head.update(*sample())
    with pytest.raises(error, match=f"^NearestMeanHead.update: .*{message}"):
        head.update(features, labels)
    head.finish()
    assert_close(head.means, fitted().means)


def test_labels_that_another_rank_could_not_look_at_are_summed_with_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what knows where ranks sum: a rank without samples has none of its tensors on the accelerator."""
    monkeypatch.setattr("dir_toolkit.heads.nearest_mean.summed", lambda outside: (outside + 2,))
    head = NearestMeanHead(4, 3).double()
    head.update(*sample())
    with pytest.raises(LabelError, match=r"must hold class indices from 0 to 2, got 2 that are not"):
        head.finish()


def test_where_values_are_not_looked_at_finish_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator."""
    for module in ("_numerics", "_checks"):
        monkeypatch.setattr(f"dir_toolkit.{module}.readable", lambda tensor: False)
    head = fitted()
    head.update(torch.zeros(3, 4), torch.tensor([0, 3, -1]))
    with pytest.raises(
        LabelError, match=r"^NearestMeanHead.finish: labels must hold class indices from 0 to 2, got 2 that are"
    ):
        head.finish()
    monkeypatch.undo()
    head.update(*sample())
    head._moments.mean[1] = math.nan
    with pytest.raises(ValueError, match=r"^NearestMeanHead.finish: means must be finite, got nan at index \[1, 0\]"):
        head.finish()
    assert_close(head.means, fitted().means)
    head.update(*sample(3))  # what was wrong is forgotten
    head.finish()
    assert_close(head.means, fitted("cosine", sample(3)).means)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_features": 0}, "num_features must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"metric": "l1"}, "metric must be one of 'cosine', 'euclidean', got 'l1'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^NearestMeanHead: {message}"):
        NearestMeanHead(**{"num_features": 4, "num_classes": 3, **arguments})


def test_wrong_features_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"^NearestMeanHead: features must be \(N, 4\), got shape \(4,\)"):
        fitted()(torch.zeros(4))


# ---- a module among others ----


@each_metric
def test_copies_pickles_states_and_compiled_forms_score_alike(metric: Any) -> None:
    head, features = fitted(metric), sample(1)[0]
    restored = NearestMeanHead(4, 3, metric=metric).double()
    restored.load_state_dict(head.state_dict())
    copied = NearestMeanHead(4, 3, metric=metric).double()
    for mine, theirs in zip(copied.buffers(), head.buffers(), strict=True):
        mine.copy_(theirs)
    torch.compiler.reset()
    compiled = torch.compile(restored, fullgraph=True, backend="eager")
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), restored, copied, compiled):
        assert_close(other(features), head(features))
    assert list(head.state_dict()) == ["means", "count"]
    assert (head.num_features, head.num_classes) == (4, 3)
    assert repr(head) == f"NearestMeanHead(num_features=4, num_classes=3, metric={metric!r})"
    head.load_state_dict(NearestMeanHead(4, 3).state_dict())
    with pytest.raises(NotFittedError, match="or load a state_dict"):
        head(features)


@each_metric
def test_no_step_waits_for_a_value(metric: Any) -> None:
    head = fitted(metric).to("meta")  # where every tensor is without values, and asking for one raises
    features = torch.zeros(4, 4, device="meta")
    assert head(features).shape == (4, 3)
    head.update(features, torch.zeros(4, device="meta").long())


def rank_main(rank: int) -> dict[str, Any]:
    features, labels = sample()
    order = labels.argsort()  # so that each rank lacks a class
    mine = order[:25] if rank == 0 else order[25:]
    head = NearestMeanHead(4, 3).double()
    head.update(features[mine], labels[mine])
    head.finish()
    if rank == 0:  # a fault that one rank alone has seen is told by both
        head.update(features, labels)
        head._outside += 1
    with pytest.raises(LabelError) as caught:
        head.finish()
    return {**head.state_dict(), "told": str(caught.value)}


def test_two_processes_with_uneven_shares_equal_one(two_ranks: Callable[..., list[Any]]) -> None:
    for saved in two_ranks(rank_main):
        assert_close(saved["means"], fitted().means, rtol=1e-12, atol=1e-12)
        assert torch.equal(saved["count"], fitted().count)
        assert "got 1 that are not" in saved["told"]


def test_means_taken_in_inference_mode_serve_afterwards() -> None:
    features, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    with torch.inference_mode():
        head = NearestMeanHead(4, 3)
        head.update(features, labels)
    head.update(features, labels)
    head.finish()
    with torch.inference_mode():
        head.update(features, labels)
        head.finish()
    z = features.clone().requires_grad_()
    head(z).sum().backward()
    assert z.grad is not None


def test_made_without_storage_means_are_taken_later() -> None:
    features, labels = torch.randn(9, 4), torch.arange(9) % 3
    with torch.device("meta"):
        head = NearestMeanHead(4, 3)
    head.to_empty(device="cpu")
    with pytest.raises(NotFittedError):
        head(features)
    head.update(features, labels)
    with torch.device("meta"):
        head.finish()
        head.update(features, labels)
        head.finish()
    expected = NearestMeanHead(4, 3)
    expected.update(features, labels)
    expected.finish()
    assert_close(head(features), expected(features))
