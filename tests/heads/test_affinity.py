from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, hessian, vmap
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dir_toolkit.errors import NotFittedError, ShapeError
from dir_toolkit.heads.affinity import AffinityHead

PAIRS = list(itertools.product(("l2", "l1"), ("gaussian", "inverse")))
each_pair = pytest.mark.parametrize(("distance", "similarity"), PAIRS)


def naive_distance(z: list[float], w: list[float], distance: str) -> float:
    return math.fsum((a - b) ** 2 if distance == "l2" else abs(a - b) for a, b in zip(z, w, strict=True))


def naive(head: AffinityHead, features: Tensor, sigma: float) -> Tensor:
    """Scores in plain float64 Python, prototype by prototype."""
    scale, rows = head.feature_scale.item(), []
    for z in features.tolist():
        row = []
        for prototypes in head.weight.tolist():
            x = min(naive_distance([scale * a for a in z], w, head.distance) for w in prototypes) / sigma
            row.append(math.exp(-x) if head.similarity == "gaussian" else 1 / (1 + x))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def naive_diversity(weight: Tensor) -> Tensor:
    flat = weight.double().flatten(0, 1).tolist()
    pairs = [naive_distance(a, b, "l2") for a, b in itertools.combinations(flat, 2)]
    mean = math.fsum(pairs) / len(pairs)
    return torch.tensor(math.fsum((d - mean) ** 2 for d in pairs) / len(pairs), dtype=torch.float64)


def margin_loss(scores: Tensor, labels: Tensor) -> Tensor:
    gaps = (0.75 + scores - scores.gather(1, labels[:, None])).relu()
    return gaps.scatter(1, labels[:, None], 0.0).sum(1).mean()


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(*arguments: Any, seed: int = 0, **options: Any) -> AffinityHead:
    torch.manual_seed(seed)
    return AffinityHead(*arguments, **options)


def assert_exact(given: Tensor, expected: Tensor) -> None:
    assert_close(given, expected, rtol=1e-12, atol=1e-12)


# ---- scores ----


def test_scores_are_those_worked_out_by_hand() -> None:
    head = AffinityHead(2, 2, prototypes=2, sigma=2.0, feature_scale=1.0)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[[0.0, 0.0], [9.0, 9.0]], [[3.0, 0.0], [1.0, 2.0]]]))
    z = torch.tensor([[1.0, 1.0]])  # squared distances 2, 128; 5, 1. Absolute ones 2, 16; 3, 1
    assert_close(head(z), torch.tensor([[math.exp(-1), math.exp(-0.5)]]))
    assert_close(head(z.long()), head(z))
    for distance, expected in (("l2", [1 / 2, 1 / 1.5]), ("l1", [1 / 2, 1 / 1.5])):
        other = AffinityHead(2, 2, 2, 2.0, distance, "inverse", feature_scale=1.0)  # type: ignore[arg-type]
        other.load_state_dict(head.state_dict())
        assert_close(other(z), torch.tensor([expected]))


@each_pair
@pytest.mark.parametrize("sigma_mode", ["fixed", "learnt"])
def test_scores_equal_a_naive_loop(distance: Any, similarity: Any, sigma_mode: Any) -> None:
    for prototypes, scale in ((1, None), (5, None), (3, 1.0), (2, 1e-3)):
        head = make(6, 4, prototypes, 7.0, distance, similarity, sigma_mode=sigma_mode, feature_scale=scale).double()
        features = sample(9, 6)
        sigma = head.log_sigma.exp().item() if sigma_mode == "learnt" else 7.0
        for n in (9, 1):
            assert_exact(head(features[:n]), naive(head, features[:n], sigma))
        with pytest.raises(AssertionError):
            assert_exact(head(features) + 1e-10, naive(head, features, sigma))
        with pytest.raises(AssertionError):
            assert_exact(head(features), naive(head, features, sigma * (1 + 1e-9)))
        assert head(features[:0]).shape == (0, 4)


def test_the_naive_loop_tells_the_pairs_apart() -> None:
    heads = [make(6, 4, 2, 7.0, *pair, feature_scale=1.0).double() for pair in PAIRS]
    for head in heads:
        head.weight = heads[0].weight
    assert len({round(naive(head, sample(1, 6), 7.0)[0, 0].item(), 9) for head in heads}) == 4


def test_scores_are_similarities() -> None:
    for pair in PAIRS:
        head = make(8, 3, 4, 10.0, *pair)
        at_prototypes = head.weight.detach().flatten(0, 1) / head.feature_scale
        scores = head(torch.cat([at_prototypes, sample(50, 8).float()]))
        assert bool((scores > 0).all())
        assert bool((scores <= 1).all())
        own = scores[torch.arange(12), torch.arange(12) // 4]
        assert_close(own, torch.ones(12), rtol=0, atol=1e-5)


@each_pair
@pytest.mark.parametrize("num_features", [2, 128, 2048])
def test_distances_start_at_the_default_sigma(distance: Any, similarity: Any, num_features: int) -> None:
    head = make(num_features, 100, 3, 10.0, distance, similarity, sigma_mode="first_batch")
    head(sample(300, num_features).float())
    assert head.sigma.item() == pytest.approx(10, rel=0.1)


def test_half_precision_and_autocast_give_float32_scores() -> None:
    for pair in PAIRS:
        head, features = make(4, 3, 5, 10.0, *pair), sample(6, 4).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(head(features), head(features.float()))
            assert head(features.bfloat16()).dtype == torch.float32
            inside = torch.autograd.grad(head(features).sum(), head.weight)[0]  # backward, too, in full precision
        assert torch.equal(inside, torch.autograd.grad(head(features).sum(), head.weight)[0])
        assert copy.deepcopy(head).bfloat16()(features.bfloat16()).dtype == torch.float32


def test_a_feature_that_is_not_finite_shows_in_its_own_scores_only() -> None:
    head = make(3, 2, 2)
    scores = head(torch.tensor([[math.nan, 0, 0], [1.0, 2.0, 3.0]]))
    assert scores[0].isnan().all()
    assert scores[1].isfinite().all()


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@each_pair
def test_no_tensor_of_all_differences_is_built(distance: Any, similarity: Any) -> None:
    head, features = make(32, 16, 4, 10.0, distance, similarity), sample(24, 32).float().requires_grad_()
    with Largest() as largest:
        head(features).sum().backward()
        head.diversity().backward()
    assert largest.numel == 16 * 4 * 32  # the prototypes; one number for each pair of sample and prototype is less
    with Largest() as largest:
        _ = features[:, None, None] - head.weight
    assert largest.numel == 24 * 16 * 4 * 32


# ---- gradients ----


@each_pair
@pytest.mark.parametrize("sigma_mode", ["fixed", "learnt"])
def test_gradients_agree_with_differences(distance: Any, similarity: Any, sigma_mode: Any) -> None:
    head = make(4, 3, 2, 10.0, distance, similarity, sigma_mode=sigma_mode).double()
    names = [name for name, _ in head.named_parameters()]
    assert len(names) == (2 if sigma_mode == "learnt" else 1)

    def scores(z: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(head, dict(zip(names, parameters, strict=True)), (z,))

    features = sample(5, 4).requires_grad_()
    assert gradcheck(scores, (features, *head.parameters()))
    if distance == "l2":
        assert gradgradcheck(scores, (features, *head.parameters()))


@each_pair
def test_gradients_are_finite_where_a_feature_is_a_prototype(distance: Any, similarity: Any) -> None:
    head = make(3, 2, 2, 10.0, distance, similarity, feature_scale=1.0).double()
    features = head.weight.detach()[:, 0].clone().requires_grad_()
    head(features)[[0, 1], [0, 1]].sum().backward()
    assert features.grad is not None
    assert head.weight.grad is not None
    assert_close(features.grad, torch.zeros_like(features), atol=1e-12, rtol=0)
    assert head.weight.grad.isfinite().all()


def test_weight_two_is_seen_twice_and_order_does_not_matter() -> None:
    head, z, labels = make(4, 3, 2).double(), sample(5, 4), torch.tensor([0, 1, 2, 1, 0])
    twice = torch.cat([z, z[:1]])
    weighted = torch.tensor([2.0, 1, 1, 1, 1], dtype=torch.float64)
    one = torch.autograd.grad((weighted[:, None] * head(z)).sum(), head.weight)[0]
    assert_exact(one, torch.autograd.grad(head(twice).sum(), head.weight)[0])
    assert_exact(head(z.flip(0)).flip(0), head(z))
    assert_exact(margin_loss(head(z.flip(0)), labels.flip(0)), margin_loss(head(z), labels))


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    head, features = make(4, 3, 2), sample(5, 4).float()
    head.requires_grad_(False)
    assert not head(features).requires_grad
    head(features.requires_grad_()).sum().backward()
    assert features.grad is not None
    assert head.weight.grad is None


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of operations it does not batch
@pytest.mark.parametrize("similarity", ["gaussian", "inverse"])
def test_forward_mode_and_second_derivatives(similarity: Any) -> None:
    head = AffinityHead(4, 3, prototypes=2, similarity=similarity).double()
    features = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def scores(x: Tensor, weight: Tensor) -> Tensor:
        return functional_call(head, {"weight": weight}, (x,))

    weight = head.weight.detach().clone().requires_grad_()
    assert gradcheck(scores, (features, weight), check_forward_ad=True)
    backward = torch.autograd.functional.hessian(lambda x: scores(x, head.weight).sum(), features.detach())
    forward = hessian(lambda x: scores(x, head.weight).sum())(features.detach())
    assert_close(forward, backward)


def test_vmap_gives_the_same_scores() -> None:
    head, features = make(4, 3, 2), sample(2, 5, 4).float()
    assert_close(vmap(head)(features), torch.stack([head(features[0]), head(features[1])]))


# ---- training ----


@pytest.mark.parametrize(
    ("sigma_mode", "num_features", "optimizer_class"),  # each two of them meet
    [
        (mode, size, (torch.optim.SGD, torch.optim.Adam)[(i + j) % 2])
        for i, mode in enumerate(("fixed", "learnt", "first_batch"))
        for j, size in enumerate((2, 128, 2048))
    ],
)
def test_training_learns_from_the_default_start(sigma_mode: Any, num_features: int, optimizer_class: Any) -> None:
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    inputs = sample(60, 16).float() + 3 * sample(3, 16, seed=1).float()[labels]
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    layer = nn.Linear(16, num_features)
    nn.init.normal_(layer.weight, std=1 / 4)
    head = AffinityHead(num_features, 3, sigma_mode=sigma_mode)
    rate = 0.5 if optimizer_class is torch.optim.SGD else 0.01
    optimizer = optimizer_class([*layer.parameters(), *head.parameters()], lr=rate)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = margin_loss(head(layer(inputs)), labels) + 0.001 * head.diversity()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.7 * losses[0]


@each_pair
def test_every_pair_of_distance_and_similarity_learns(distance: Any, similarity: Any) -> None:
    head, labels = make(128, 3, 5, 10.0, distance, similarity), torch.arange(60) % 3
    features = (sample(60, 128) + sample(3, 128, seed=1)[labels]).float()
    optimizer, losses = torch.optim.Adam(head.parameters(), lr=0.01), []
    for _ in range(50):
        optimizer.zero_grad()
        loss = margin_loss(head(features), labels)
        loss.backward()
        assert head.weight.grad is not None
        assert head.weight.grad.isfinite().all()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# ---- sigma from the first batch ----


@each_pair
def test_the_first_training_batch_sets_sigma(distance: Any, similarity: Any) -> None:
    head = make(4, 3, 2, 10.0, distance, similarity, sigma_mode="first_batch").double()
    first, second = sample(5, 4), 3 * sample(7, 4, seed=1)
    with pytest.raises(
        NotFittedError, match="AffinityHead: sigma must be set before it is used in eval mode, got no b"
    ):
        head.eval()(first)
    assert head.train()(first[:0]).shape == (0, 3)  # an empty batch leaves it to the next
    assert head.sigma.isnan()
    scores, scale = head(first), head.feature_scale.item()
    far = [
        naive_distance([scale * a for a in z], w, distance)
        for z in first.tolist()
        for w in head.weight.flatten(0, 1).tolist()
    ]
    sigma = math.fsum(far) / len(far)
    assert head.sigma.item() == pytest.approx(sigma, rel=1e-12)
    assert_exact(scores, naive(head, first, sigma))
    assert_exact(head(second), naive(head, second, sigma))
    assert_exact(head.eval()(second), naive(head, second, sigma))


def test_sigma_of_the_first_batch_survives_copies_and_states() -> None:
    head, features = make(4, 3, 2, sigma_mode="first_batch"), sample(5, 4).float()
    empty = head.state_dict()
    empty = {name: value.clone() for name, value in empty.items()}
    head(features)
    fresh = AffinityHead(4, 3, 2, sigma_mode="first_batch")
    fresh.load_state_dict(head.state_dict())
    copied = AffinityHead(4, 3, 2, sigma_mode="first_batch")
    for mine, theirs in zip(copied.state_dict().values(), head.state_dict().values(), strict=True):
        mine.copy_(theirs)  # as averages of weights and DistributedDataParallel do
    for other in (fresh, copied, copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(other.eval()(2 * features), head(2 * features))
        assert torch.equal(other.train()(2 * features), head(2 * features))
    head.load_state_dict(empty)
    with pytest.raises(NotFittedError, match="Run one batch in training mode, load a state_dict, or pass"):
        head.eval()(features)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_first_batch_that_gives_no_sigma_is_refused(bad: float) -> None:
    head = make(4, 3, 2, sigma_mode="first_batch")
    with pytest.raises(ValueError, match=f"mean distance .* must be positive and finite, got (nan|{bad})"):
        head(torch.full((2, 4), bad))
    with torch.no_grad():
        head.weight.zero_()
    with pytest.raises(ValueError, match="the first batch from the prototypes must be positive and finite, got 0"):
        head(torch.zeros(2, 4))
    assert head.sigma.isnan()


def rank_main(rank: int) -> dict[str, Tensor]:
    head = make(4, 3, 2, sigma_mode="first_batch").double()
    wrapped = nn.parallel.DistributedDataParallel(head)
    mine = slice(0, 4) if rank == 0 else slice(4, None)  # uneven
    wrapped(sample(20, 4)[mine]).sum().backward()
    assert head.weight.grad is not None
    return {"sigma": head.sigma, "grad": head.weight.grad}


def test_two_processes_with_uneven_shares_find_the_sigma_of_one(two_ranks: Callable[..., list[Any]]) -> None:
    head = make(4, 3, 2, sigma_mode="first_batch").double()
    (head(sample(20, 4)).sum() / 2).backward()
    assert head.weight.grad is not None
    for saved in two_ranks(rank_main):
        assert_exact(saved["sigma"], head.sigma)
        assert_exact(saved["grad"], head.weight.grad)


# ---- diversity ----


def diversity_of(weight: Tensor) -> Tensor:
    num_classes, prototypes, num_features = weight.shape
    head = AffinityHead(num_features, num_classes, prototypes)
    del head.weight
    head.weight = weight  # type: ignore[assignment]
    return head.diversity()


def test_diversity_is_that_worked_out_by_hand() -> None:
    head = AffinityHead(1, 3, prototypes=1)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([0.0, 1.0, 3.0])[:, None, None])
    # squared distances 1, 9, 4; their mean 14/3
    assert head.diversity().item() == pytest.approx(((11 / 3) ** 2 + (13 / 3) ** 2 + (2 / 3) ** 2) / 3)


@pytest.mark.parametrize("num_features", [1, 2, 5, 6, 7, 40])
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_diversity_equals_a_naive_loop(num_features: int, shift: float) -> None:
    for num_classes, prototypes in ((2, 1), (7, 1), (3, 4)):
        head = make(num_features, num_classes, prototypes).double()
        with torch.no_grad():
            head.weight.mul_(3).add_(shift)
        tolerance = 1e-12 if shift == 0 else 1e-8  # a loop over far prototypes is itself no better
        expected = naive_diversity(head.weight)
        assert_close(head.diversity(), expected, rtol=tolerance, atol=tolerance)
        if expected > 0:
            with pytest.raises(AssertionError):
                assert_close(head.diversity() * (1 + 1e-6), expected, rtol=tolerance, atol=tolerance)
        if shift == 0 and head.weight.numel() < 100:
            assert gradcheck(diversity_of, (head.weight,))


def test_diversity_of_float32_prototypes_loses_no_digits() -> None:
    head = make(64, 20, 5)
    assert_close(head.diversity().double(), naive_diversity(head.weight), rtol=1e-5, atol=0)
    even = AffinityHead(20, 20, 1)  # corners of a simplex: all equally far apart
    with torch.no_grad():
        even.weight.copy_(100 * torch.eye(20)[:, None])
    assert even.diversity().item() < 1e-4  # of distances of 20,000
    assert head.to(torch.bfloat16).diversity().dtype == torch.float32


def test_diversity_of_one_prototype_or_of_one_pair_is_zero() -> None:
    for num_classes in (1, 2):
        head = make(3, num_classes, 1)
        head.diversity().backward()
        assert head.diversity().item() == pytest.approx(0, abs=1e-10)
        assert head.weight.grad is not None
        assert_close(head.weight.grad, torch.zeros_like(head.weight), atol=1e-5, rtol=0)
    assert AffinityHead(3, 1, 1)(torch.zeros(2, 3)).shape == (2, 1)


# ---- a module among others ----


@each_pair
@pytest.mark.parametrize("sigma_mode", ["fixed", "learnt", "first_batch"])
def test_copies_pickles_and_states_score_alike(distance: Any, similarity: Any, sigma_mode: Any) -> None:
    head, features = make(5, 3, 2, 7.0, distance, similarity, sigma_mode=sigma_mode), sample(7, 5).float()
    head(features)
    restored = AffinityHead(5, 3, 2, 99.0, distance, similarity, sigma_mode=sigma_mode, feature_scale=3.0)
    restored.load_state_dict(head.state_dict())
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), restored):
        assert torch.equal(other(features), head(features))
    names = {"weight", "feature_scale", "log_sigma" if sigma_mode == "learnt" else "sigma"}
    assert set(head.state_dict()) == names
    assert (head.num_features, head.num_classes, head.num_prototypes) == (5, 3, 2)
    assert f"sigma_mode={sigma_mode!r}" in repr(head)


@pytest.mark.parametrize(
    ("distance", "sigma_mode"), [("l2", "fixed"), ("l1", "fixed"), ("l2", "learnt"), ("l1", "first_batch")]
)
def test_compiled_forms_score_alike(distance: Any, sigma_mode: Any) -> None:
    head, features = make(5, 3, 2, distance=distance, sigma_mode=sigma_mode), sample(7, 5).float()
    head(features)
    torch.compiler.reset()
    compiled = torch.compile(head.eval() if sigma_mode == "first_batch" else head, fullgraph=True, backend="eager")
    assert_close(compiled(features), head(features))
    one = torch.autograd.grad(compiled(features).square().sum(), head.weight)[0]
    assert_close(one, torch.autograd.grad(head(features).square().sum(), head.weight)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(compiled(features), head(features))


@pytest.mark.parametrize("distance", ["l2", "l1"])
def test_an_exported_head_scores_batches_of_any_size(distance: Any) -> None:
    head = make(5, 3, 2, distance=distance).eval()
    sizes = ({0: torch.export.Dim("n", min=2, max=100)},)
    exported = torch.export.export(head, (sample(7, 5).float(),), dynamic_shapes=sizes).module()
    for n in (2, 7, 50):
        features = sample(n, 5, seed=n).float()
        assert_close(exported(features), head(features))


@pytest.mark.parametrize("distance", ["l2", "l1"])
@pytest.mark.parametrize("sigma_mode", ["fixed", "learnt", "first_batch"])
def test_no_step_waits_for_a_value(distance: Any, sigma_mode: Any) -> None:
    head = make(5, 3, 2, distance=distance, sigma_mode=sigma_mode)
    head(sample(4, 5).float())
    head.to("meta")  # where every tensor is without values, and asking for one raises
    assert head(torch.zeros(4, 5, device="meta")).shape == (4, 3)
    assert head.diversity().shape == ()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_features": 0}, ValueError, "num_features must be at least 1, got 0"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"prototypes": 0}, ValueError, "prototypes must be at least 1, got 0"),
        ({"prototypes": 2.5}, TypeError, "prototypes must be a whole number, got 2.5"),
        ({"sigma": 0.0}, ValueError, "sigma must be > 0, got 0.0"),
        ({"sigma": -1}, ValueError, "sigma must be > 0, got -1"),
        ({"sigma": math.nan}, ValueError, "sigma must be > 0, got nan"),
        ({"sigma": 1e-50}, ValueError, "sigma must fit into float32"),
        ({"sigma": 1e39, "sigma_mode": "learnt"}, ValueError, "sigma must fit into float32"),
        ({"feature_scale": 1e39}, ValueError, "feature_scale must fit into float32"),
        ({"distance": "l3"}, ValueError, "distance must be one of 'l2', 'l1', got 'l3'"),
        ({"similarity": "cosine"}, ValueError, "similarity must be one of 'gaussian', 'inverse', got 'cosine'"),
        ({"sigma_mode": "free"}, ValueError, "sigma_mode must be one of 'fixed', 'learnt', 'first_batch', got 'free'"),
        ({"feature_scale": 0}, ValueError, "feature_scale must be > 0, got 0"),
        ({"feature_scale": "1"}, TypeError, "feature_scale must be a number, got '1'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^AffinityHead: {message}"):
        AffinityHead(**{"num_features": 4, "num_classes": 3, **arguments})


def test_wrong_features_are_refused() -> None:
    head = AffinityHead(4, 3)
    with pytest.raises(ShapeError, match=r"^AffinityHead: features must be \(N, 4\), got shape \(2, 3\)"):
        head(torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"^AffinityHead: features must be a torch.Tensor, got float"):
        head(1.0)
    with pytest.raises(TypeError, match=r"^AffinityHead: features must be integers or floats, got dtype torch.bool"):
        head(torch.zeros(2, 4) > 0)
