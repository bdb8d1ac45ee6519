"""Decoupling: what is frozen stays frozen to the bit, and a second stage serves the rare labels."""

from __future__ import annotations

import copy
import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dir_toolkit.decoupling import Frozen, choose_normalization, freeze, reinitialize, stage_two
from dir_toolkit.errors import DirToolkitWarning, LabelError, ShapeError
from dir_toolkit.experiment.backbones import DigitCNN, small_resnet
from dir_toolkit.experiment.data.augment import to_float
from dir_toolkit.experiment.data.images import ImageSet, content_digest
from dir_toolkit.experiment.training.loop import Optimization, evaluate, fit, predict
from dir_toolkit.experiment.training.runtime import Runtime
from dir_toolkit.heads.affinity import AffinityHead
from dir_toolkit.heads.cosine import CosineHead
from dir_toolkit.heads.linear import LinearHead
from dir_toolkit.heads.nearest_mean import NearestMeanHead
from dir_toolkit.heads.normalized import ScaledHead, tau_normalized
from dir_toolkit.labels.bins import Bins
from dir_toolkit.labels.density import LabelDensity
from dir_toolkit.labels.sampling import BinSampler
from dir_toolkit.labels.weights import LDS
from dir_toolkit.longtail import LongTailModel
from dir_toolkit.losses.cross_entropy import cross_entropy
from dir_toolkit.metrics.classification import ClassificationMetrics, balanced_error
from dir_toolkit.metrics.regression import RegressionMetrics

CLASSES = Bins.classes(4)
TAIL = (150, 40, 12, 4)
RUNTIME = Runtime(torch.device("cpu"), seed=1)


def digits_like(counts: tuple[int, ...], seed: int) -> ImageSet:
    """Grey images of 16 pixels, one faint pattern a class in strong noise, with class indices."""
    patterns = np.random.default_rng(99).normal(size=(len(counts), 1, 16, 16))
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    noise = random.normal(size=(len(labels), 1, 16, 16))
    images = np.clip(128 + 12 * patterns[labels] + 40 * noise, 0, 255).astype(np.uint8)
    return image_set(images, labels)


def image_set(images: np.ndarray, labels: np.ndarray) -> ImageSet:
    rows = np.arange(len(labels))
    return ImageSet(images, labels, rows, content_digest(images, labels, rows))


def resnet() -> nn.Module:
    with RUNTIME.seeded("resnet"):
        return small_resnet(width=4, in_channels=1)


class Classifier(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def with_dropout() -> nn.Module:
    """BatchNorm that counts, BatchNorm without weights, and dropout."""
    with RUNTIME.seeded("dropout"):
        backbone = nn.Sequential(
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(16, 16),
            nn.BatchNorm1d(16, affine=False),
        )
    return backbone


BACKBONES = pytest.mark.parametrize("make", [resnet, with_dropout])
IMAGES = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(2))


def bits(module: nn.Module) -> dict[str, bytes]:
    return {name: value.detach().numpy().tobytes() for name, value in module.state_dict().items()}


def second_stage(model: nn.Module, train: ImageSet, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    density = LabelDensity.count(train.labels, CLASSES)
    arguments: dict[str, Any] = {
        "metrics": ClassificationMetrics(density),
        "loss": cross_entropy,
        "sampler": BinSampler(train.labels, CLASSES, seed=5),
        "runtime": RUNTIME,
        "folder": folder,
        "augmentation": False,
        "optimization": Optimization(epochs=2, batch_size=32, lr=0.02),
    }
    return fit(model, train, digits_like((20,) * 4, seed=8), **{**arguments, **changes})


# -- freeze


@BACKBONES
@pytest.mark.parametrize("method", ["crt", "lws"])
def test_a_second_stage_leaves_every_bit_of_the_encoder(make: Any, method: Any, tmp_path: Path) -> None:
    model = Classifier(make(), LinearHead(16, 4))
    model.train()(IMAGES)  # so that BatchNorm has statistics of its own
    handle = stage_two(model, method)
    before, head = bits(model.backbone), bits(model.head)
    modes: list[bool] = []

    def loss(scores: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        modes.extend([model.training, *(part.training for part in model.backbone.modules())])
        return cross_entropy(scores, target, weight)

    train = digits_like(TAIL, seed=0)
    second_stage(model, train, tmp_path, loss=loss)
    assert bits(model.backbone) == before
    assert bits(model.head) != head
    assert modes[0]  # fit called train() on the whole
    assert not any(modes[1 : 1 + len(list(model.backbone.modules()))])
    handle.remove()
    second_stage(model, train, tmp_path / "thawed")
    assert bits(model.backbone) != before  # the comparison sees what training does to an encoder that is not frozen


def test_weights_statistics_and_dropout_are_each_frozen() -> None:
    encoder = with_dropout()
    before = bits(encoder)
    torch.manual_seed(0)
    plain = encoder.train()(IMAGES)
    assert bits(encoder) != before
    assert not torch.equal(plain, encoder(IMAGES))  # dropout
    before = bits(encoder)
    freeze(encoder)
    model = nn.Sequential(encoder, nn.Linear(16, 1)).train()
    assert torch.equal(encoder(IMAGES), encoder.train()(IMAGES))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1, weight_decay=0.5)
    for _ in range(3):
        model.train()(IMAGES).sum().backward()
        optimizer.step()
    assert bits(encoder) == before
    assert all(not p.requires_grad and p.grad is None for p in encoder.parameters())
    expected = encoder.eval()(IMAGES)
    assert torch.equal(encoder.train()(IMAGES), expected)


def test_gradients_pass_through_a_frozen_encoder_to_its_input() -> None:
    encoder = with_dropout()
    freeze(encoder)
    images = IMAGES.clone().requires_grad_()
    encoder.train()(images).square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_a_part_of_a_frozen_encoder_is_frozen_when_it_is_called_by_itself() -> None:
    encoder = with_dropout()
    freeze(encoder)
    before = bits(encoder)
    encoder.train()
    maps = IMAGES
    for part in encoder.children():  # as forward_features of timm's models does
        maps = part(maps)
    assert bits(encoder) == before
    assert torch.equal(maps, encoder(IMAGES))


def test_removing_restores_what_was_and_no_more() -> None:
    encoder = with_dropout()
    encoder.train()
    encoder[3].eval()
    encoder[2].weight.requires_grad_(False)
    required = {name: p.requires_grad for name, p in encoder.named_parameters()}
    modes = [part.training for part in encoder.modules()]
    handle = freeze(encoder)
    assert isinstance(handle, Frozen)
    encoder.train()
    handle.remove()
    handle.remove()  # nothing is left to undo
    assert {name: p.requires_grad for name, p in encoder.named_parameters()} == required
    assert [part.training for part in encoder.modules()] == modes
    encoder.train()(IMAGES)
    assert encoder[5].training


def test_with_restores_even_after_an_error() -> None:
    encoder = with_dropout().train()
    with freeze(encoder) as handle:
        assert isinstance(handle, Frozen)
        assert not any(p.requires_grad for p in encoder.parameters())
    assert all(p.requires_grad for p in encoder.parameters())
    with pytest.raises(RuntimeError, match="mat1 and mat2"), freeze(encoder):
        encoder(torch.zeros(1, 1, 4, 4))
    assert all(p.requires_grad for p in encoder.parameters())
    assert all(part.training for part in encoder.modules())


def test_frozen_twice_is_undone_twice() -> None:
    encoder = with_dropout().train()
    with freeze(encoder):
        with freeze(encoder):
            pass
        encoder.train()(IMAGES)
        assert not any(part.training for part in encoder.modules())
        assert not any(p.requires_grad for p in encoder.parameters())
    assert all(part.training for part in encoder.modules())
    assert all(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("inner", [False, True])
def test_what_is_frozen_twice_is_free_when_both_handles_are_gone(first: int, inner: bool) -> None:
    model = nn.Sequential(with_dropout(), nn.Linear(16, 1)).train()
    model[0][3].eval()
    model[0][2].weight.requires_grad_(False)
    required = [p.requires_grad for p in model.parameters()]
    modes = [part.training for part in model.modules()]
    handles = [freeze(model), freeze(model[0] if inner else model)]
    handles.pop(first).remove()
    model.train()(IMAGES)
    assert not any(part.training for part in model[0].modules())
    assert not any(p.requires_grad for p in model[0].parameters())
    outer_stands = not inner or first == 1
    assert model[1].weight.requires_grad != outer_stands
    handles.pop().remove()
    assert [p.requires_grad for p in model.parameters()] == required
    for part, mode in zip(model[0].modules(), modes[1:], strict=False):
        assert part.training == mode


def test_an_optimizer_made_before_moves_nothing_by_gradients_left_over() -> None:
    model = nn.Sequential(with_dropout(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        model(IMAGES).sum().backward()
        optimizer.step()
    handle = freeze(model[0])
    assert all(p.grad is None for p in model[0].parameters())
    before, head = bits(model[0]), bits(model[1])
    optimizer.step()
    assert bits(model[0]) == before
    assert bits(model[1]) != head
    handle.remove()


def through_pickle(module: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(module))
    return copied


def through_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copied: nn.Module = torch.load(file, weights_only=False)
    return copied


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_of_a_frozen_module_is_frozen_too(copied: Any) -> None:
    model = nn.Sequential(with_dropout(), nn.Linear(16, 1))
    handle = freeze(model[0])
    other = copied(model)
    handle.remove()  # frees the original alone
    before = bits(other[0])
    first, second = (other.train()(IMAGES) for _ in range(2))
    assert torch.equal(first, second)
    assert bits(other[0]) == before
    assert [p.requires_grad for p in other.parameters()] == [False] * 6 + [True] * 2
    assert not torch.equal(model.train()(IMAGES), model(IMAGES))


def test_a_frozen_encoder_is_frozen_in_a_compiled_model() -> None:
    model = Classifier(with_dropout(), nn.Linear(16, 4))
    freeze(model.backbone)
    before = bits(model.backbone)
    expected = model.eval()(IMAGES)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            compiled.train()
            torch.testing.assert_close(compiled(IMAGES), expected)
    finally:
        torch._dynamo.reset()
    assert bits(model.backbone) == before


def test_only_modules_are_frozen() -> None:
    with pytest.raises(TypeError, match=r"^freeze: module must be a Module, got Tensor\."):
        freeze(torch.zeros(1))  # type: ignore[arg-type]


def test_gradients_left_on_a_frozen_encoder_do_not_count_in_the_next_stage(tmp_path: Path) -> None:
    heads = []
    for left in (False, True):
        model = Classifier(with_dropout(), LinearHead(16, 4))
        if left:
            (1e3 * model.eval()(IMAGES).square().sum()).backward()
            model.head.zero_grad()
        stage_two(model, "crt")
        budget = Optimization(epochs=1, batch_size=32, lr=0.1, optimizer="sgd", clip_norm=0.1)
        second_stage(model, digits_like(TAIL, seed=0), tmp_path / str(left), optimization=budget)
        heads.append(bits(model.head))
    assert heads[0] == heads[1]


# -- reinitialize


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(3, 2),
        lambda: LinearHead(3, 2, bias=False),
        lambda: CosineHead(3, 2),
        lambda: CosineHead(3, 2, learn_scale=True),
        lambda: AffinityHead(3, 2, prototypes=4),
        lambda: AffinityHead(3, 2, prototypes=4, sigma_mode="learnt"),
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())),
        lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)),
        lambda: nn.LSTM(2, 3),
    ],
    ids=["linear", "head", "cosine", "cosine_learnt", "affinity", "affinity_learnt", "nested", "norm", "lstm"],
)
@pytest.mark.parametrize("seed", [0, 7])
def test_a_module_started_afresh_equals_a_new_one_of_that_seed(make: Any, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = make()
        torch.manual_seed(seed + 1)
        used = make()
    # What training moves: parameters, and the statistics of norms; a head's settings stay.
    statistics = [value for name, value in used.named_buffers() if "running" in name or "tracked" in name]
    with torch.no_grad():
        for value in [*used.parameters(), *statistics]:
            value.add_(1)
    assert bits(used) != bits(new)
    reinitialize(used, seed=seed)
    assert bits(used) == bits(new)
    reinitialize(used, seed=seed + 2)
    assert bits(used) != bits(new)


def test_starting_afresh_draws_no_global_random_number() -> None:
    model = Classifier(with_dropout(), LinearHead(16, 4))
    before = torch.get_rng_state()
    reinitialize(model.head, seed=3)
    stage_two(model, "crt", seed=3)
    assert torch.equal(torch.get_rng_state(), before)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))


def test_a_layer_that_cannot_be_reset_is_refused_before_anything_changes() -> None:
    module = nn.Sequential(nn.Linear(2, 2), Odd())
    before = bits(module)
    rule = r"^reinitialize: every layer with parameters must have reset_parameters\(\), got Odd\. Give it one"
    with pytest.raises(TypeError, match=rule):
        reinitialize(module)
    assert bits(module) == before
    with pytest.raises(ValueError, match=r"^reinitialize: module must have parameters, got ReLU\."):
        reinitialize(nn.ReLU())
    with pytest.raises(TypeError, match=r"^reinitialize: module must be a Module, got NoneType\."):
        reinitialize(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^reinitialize: seed must be at least 0, got -1\."):
        reinitialize(nn.Linear(1, 1), seed=-1)
    with pytest.raises(ValueError, match=r"^reinitialize: seed must be at most 9,.*, got a whole number of 71 bits\.$"):
        reinitialize(nn.Linear(1, 1), seed=2**70)
    reinitialize(nn.Linear(1, 1), seed=2**63 - 1)
    with pytest.raises(TypeError, match=r"^reinitialize: seed must be a whole number, got 1\.5\."):
        reinitialize(nn.Linear(1, 1), seed=1.5)  # type: ignore[arg-type]


# -- stage_two


def regressor(backbone: nn.Module) -> LongTailModel:
    return LongTailModel(backbone, 16, Bins.uniform(0, 12, count=12), head="regression")


def scores(model: nn.Module) -> Tensor:
    output = model(IMAGES)
    return getattr(output, "scores", output)


@pytest.mark.parametrize("method", ["crt", "rrt"])
@pytest.mark.parametrize("make", [lambda b: Classifier(b, LinearHead(16, 4)), regressor])
def test_crt_and_rrt_freeze_the_backbone_and_start_the_head_afresh(make: Any, method: Any) -> None:
    model = make(with_dropout())
    head, before, expected = model.head, bits(model.backbone), copy.deepcopy(model.head)
    handle = stage_two(model, method, seed=4)
    reinitialize(expected, seed=4)
    assert model.head is head
    assert bits(model.head) == bits(expected)
    assert bits(model.backbone) == before
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    assert torch.equal(scores(model.train()), scores(model))
    handle.remove()
    assert all(p.requires_grad for p in model.parameters())


def test_a_head_that_was_frozen_learns_again_in_the_second_stage() -> None:
    model = Classifier(with_dropout(), nn.Linear(16, 4))
    stage_two(model, "lws").remove()
    model.head = model.head.linear  # frozen, as a ScaledHead has it
    stage_two(model, "crt")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


@pytest.mark.parametrize("make", [lambda b: Classifier(b, nn.Linear(16, 4)), regressor])
def test_lws_scales_the_head_as_it_was_trained(make: Any) -> None:
    model = make(with_dropout()).eval()
    before, linear = scores(model), bits(model.head)
    stage_two(model, "lws")
    assert isinstance(model.head, ScaledHead)
    assert {"linear." + name: value for name, value in linear.items()}.items() <= bits(model.head).items()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.scale"]
    torch.testing.assert_close(scores(model), before)


def test_a_model_without_the_two_parts_or_with_another_head_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^stage_two: model must be a Module, got NoneType\."):
        stage_two(None, "crt")  # type: ignore[arg-type]
    rule = r"^stage_two: model must have modules named backbone and head, got Sequential\. Use freeze\(encoder\) and"
    with pytest.raises(TypeError, match=rule):
        stage_two(nn.Sequential(nn.Linear(1, 1)), "crt")
    model = Classifier(with_dropout(), CosineHead(16, 4))
    for method in ("cRT", None, 1):
        with pytest.raises(ValueError, match=r"^stage_two: method must be one of 'crt', 'lws', 'rrt', got"):
            stage_two(model, method)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r'^stage_two: model\.head must be an nn\.Linear for "lws", got CosineHead\.'):
        stage_two(model, "lws")
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        stage_two(model, "crt", seed=-1)
    twice = Classifier(with_dropout(), nn.Linear(16, 4))
    stage_two(twice, "lws").remove()
    with pytest.raises(TypeError, match=r'must be an nn\.Linear for "lws", got ScaledHead'):
        stage_two(twice, "lws")
    rule = r'^stage_two: model\.head must be trainable for "crt", got a ScaledHead.*Set model\.head = model'
    with pytest.raises(TypeError, match=rule):
        stage_two(twice, "crt")
    for refused in (model, twice):  # nothing was frozen
        assert all(p.requires_grad for p in refused.backbone.parameters())
        assert refused.backbone.train()[5].training
        refused.backbone(IMAGES)
        assert refused.backbone[5].training


# -- what stage two buys


def fresh_pair() -> tuple[ImageSet, ImageSet]:
    return digits_like(TAIL, seed=0), digits_like((100,) * 4, seed=1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    """Trained on the long tail as it comes."""
    train, _ = fresh_pair()
    with RUNTIME.seeded("plain"):
        model = Classifier(with_dropout(), LinearHead(16, 4))
    folder = tmp_path_factory.mktemp("plain")
    budget = Optimization(epochs=8, batch_size=32, lr=0.01)
    second_stage(model, train, folder, sampler=None, optimization=budget)
    return model


def error_of(model: nn.Module, data: ImageSet) -> float:
    density = LabelDensity(CLASSES, TAIL)
    result = evaluate(model, data, metrics=ClassificationMetrics(density), runtime=RUNTIME)
    return result.summary()["balanced_error/all"]


@pytest.mark.parametrize("method", ["crt", "lws"])
def test_a_balanced_head_errs_less_on_rare_classes(plain: Classifier, method: Any, tmp_path: Path) -> None:
    train, test = fresh_pair()
    model = copy.deepcopy(plain)
    before = error_of(model, test)
    stage_two(model, method)
    second_stage(model, train, tmp_path, optimization=Optimization(epochs=4, batch_size=32, lr=0.05))
    assert error_of(model, test) < before - 0.04


def test_nearest_means_of_frozen_features_err_less_on_rare_classes(plain: Classifier) -> None:
    train, test = fresh_pair()
    model = copy.deepcopy(plain)
    before = error_of(model, test)
    freeze(model.backbone)
    head = NearestMeanHead(16, 4)
    features = model.backbone.train()(to_float(torch.from_numpy(train.images)))
    head.update(features, torch.from_numpy(train.labels))
    head.finish()
    for j in range(4):
        torch.testing.assert_close(head.means[j], features[torch.from_numpy(train.labels) == j].mean(0))
    model.head = head
    assert error_of(model.train(), test) < before - 0.04


def shades(counts: np.ndarray, seed: int) -> ImageSet:
    """Grey images whose brightness tells the label, blurred by noise."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.float32) + 0.5
    apparent = labels + random.normal(0, 2, len(labels))
    pixels = 30 + 10 * apparent[:, None, None, None] + random.normal(0, 10, (len(labels), 1, 16, 16))
    return image_set(np.clip(pixels, 0, 255).astype(np.uint8), labels)


def test_rrt_with_inverse_weights_lowers_the_error_of_rare_labels(tmp_path: Path) -> None:
    bins = Bins.uniform(0, 12, count=12)
    counts = np.array([120, 110, 90, 60, 30, 15, 8, 5, 3, 2, 2, 1])
    train, val, test = shades(counts, 0), shades(np.full(12, 5), 1), shades(np.full(12, 20), 2)
    density = LabelDensity.count(train.labels, bins)
    metrics = RegressionMetrics(density)
    with RUNTIME.seeded("shades"):
        model = LongTailModel(with_dropout(), 16, bins, density=density, head="regression")
    arguments: dict[str, Any] = {
        "metrics": metrics,
        "loss": model.criterion,
        "runtime": RUNTIME,
        "augmentation": False,
        "optimization": Optimization(epochs=6, batch_size=32, lr=0.02),
    }
    fit(model, train, val, folder=tmp_path / "one", **arguments)
    before = evaluate(model, test, metrics=metrics, runtime=RUNTIME).summary()
    stage_two(model, "rrt")
    encoder = bits(model.backbone)
    weights = LDS(bins, scheme="inverse").fit(density)
    fit(model, train, val, folder=tmp_path / "two", weights=weights, **arguments)
    after = evaluate(model, test, metrics=metrics, runtime=RUNTIME).summary()
    assert bits(model.backbone) == encoder
    assert after["mae/few"] < before["mae/few"] - 0.3
    assert math.isfinite(after["mae/many"])


# -- choose_normalization


def long_and_short() -> tuple[nn.Linear, Tensor, Tensor]:
    """A head whose weights grow with the class counts, and validation features about its directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(5, 6, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    head = nn.Linear(6, 5)
    with torch.no_grad():
        head.weight.copy_(directions * torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])[:, None])
    labels = torch.arange(5).repeat(60)
    return head, 2 * directions[labels] + 0.7 * torch.randn(300, 6, generator=generator), labels


def test_tau_is_that_of_least_balanced_error() -> None:
    head, features, labels = long_and_short()
    taus = [0.0, 0.3, 0.9, 1.7]
    choice = choose_normalization(head, features, labels, taus=taus)
    norms = head.weight.detach().double().norm(dim=1, keepdim=True)
    naive = []
    for tau in taus:
        right = (features.double() @ (head.weight.detach().double() / norms**tau).t()).argmax(1) == labels
        naive.append(sum(1 - right[labels == j].double().mean().item() for j in range(5)) / 5)
    np.testing.assert_allclose(choice.scores, naive, atol=1e-12)
    assert len(set(naive)) == 4  # no ties: the least is one
    assert choice.tau == taus[int(np.argmin(naive))]
    assert 0 < choice.tau < 1.7
    assert choice.taus.tolist() == taus
    assert (choice.by, choice.temperature) == ("balanced_error", 1.0)
    assert not choice.scores.flags.writeable
    chosen = tau_normalized(head, choice.tau)
    assert balanced_error(chosen(features), labels, 5) == pytest.approx(min(naive), abs=1e-12)


def test_by_default_taus_reach_from_zero_to_two_and_ties_take_the_middle() -> None:
    head, features, labels = long_and_short()
    weight = head.weight.detach().clone()
    choice = choose_normalization(head, features, labels)
    np.testing.assert_allclose(choice.taus, np.arange(41) / 20)
    assert choice.scores[list(choice.taus).index(choice.tau)] == choice.scores.min()
    assert choice.scores.min() < choice.scores[0] - 0.1
    assert torch.equal(head.weight, weight)
    easy = choose_normalization(head, 100 * torch.eye(5) @ weight, torch.arange(5), taus=[0.5, 1, 1.5, 2, 3])
    best = np.flatnonzero(easy.scores == easy.scores.min())
    if len(best) == best[-1] - best[0] + 1:
        assert easy.tau == easy.taus[(best[0] + best[-1]) // 2]


def test_what_cannot_be_chosen_from_is_refused() -> None:
    head, features, labels = long_and_short()
    where = "^choose_normalization: "
    with pytest.raises(TypeError, match=where + r"head must be a Linear, got CosineHead\."):
        choose_normalization(CosineHead(6, 5), features, labels)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=where + r"features must be a torch\.Tensor, got ndarray"):
        choose_normalization(head, features.numpy(), labels)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=where + r"labels must be a torch\.Tensor, got list"):
        choose_normalization(head, features, labels.tolist())  # type: ignore[arg-type]
    for taus in ([1, 0.5], [-1, 0], [[0, 1]]):
        with pytest.raises(ValueError, match=where + "taus must be one row, rising and not negative"):
            choose_normalization(head, features, labels, taus=taus)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=where + "taus must hold at least one value"):
        choose_normalization(head, features, labels, taus=[])
    with pytest.raises(ShapeError, match=where + r"features must be \(N, 6\), got shape \(300, 5\)"):
        choose_normalization(head, features[:, :5], labels)
    with pytest.raises(ShapeError, match=where + r"labels must be \(300,\), one per row of features, got"):
        choose_normalization(head, features, labels[:-1])
    with pytest.raises(LabelError, match="target must hold class indices from 0 to 4, got 5"):
        choose_normalization(head, features, labels + 1)
    with pytest.raises(ShapeError, match="target must hold at least one value"):
        choose_normalization(head, features[:0], labels[:0])


def test_a_model_goes_all_the_way_with_images_of_one_size() -> None:
    """DigitCNN, whose last ReLU works in place, freezes like any other."""
    model = Classifier(DigitCNN(4, size=8, in_channels=1, activation=True), nn.Linear(4, 3))
    stage_two(model, "crt")
    before = bits(model.backbone)
    model.train()(torch.randn(5, 1, 8, 8)).square().sum().backward()
    assert bits(model.backbone) == before
    assert model.head.weight.grad is not None
    data = image_set(np.zeros((3, 1, 8, 8), np.uint8), np.arange(3))
    assert predict(model, data, runtime=RUNTIME).shape == (3, 3)


@pytest.mark.parametrize("case", ["calibrated", "from the start", "in the loss"])
def test_an_adjustment_that_would_correct_a_second_time_is_told(case: str) -> None:
    density = LabelDensity(CLASSES, list(TAIL))
    options: dict[str, Any] = {} if case == "calibrated" else {"target_prior": "uniform"}
    options |= {"adjust": "in_loss"} if case == "in the loss" else {}
    model = LongTailModel(nn.Linear(3, 6), 6, CLASSES, density=density, **options)
    if case == "calibrated":
        model.set_prior("uniform", 0.5)
    advice = (
        "Train a model without it" if case == "in the loss" else r"Call model\.calibrate after this stage, or model\."
    )
    for method in ("crt", "lws"):
        with pytest.warns(DirToolkitWarning, match=rf"^stage_two: .* rare ones are then corrected twice\. {advice}"):
            stage_two(copy.deepcopy(model), method)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", ["none", "temperature", "training prior", "tau 0", "meta", "in the loss, tau 0"])
def test_what_corrects_nothing_is_not_told(case: str) -> None:
    density = LabelDensity(CLASSES, list(TAIL))
    options: dict[str, Any] = {"target_prior": "uniform", "adjust": "in_loss", "tau": 0.0} if "loss" in case else {}
    model = LongTailModel(nn.Linear(3, 6), 6, CLASSES, density=density, **options)
    if case == "temperature":
        model.set_prior(None, temperature=2.0)
    elif case in ("training prior", "tau 0"):
        model.set_prior("uniform", 0.0) if case == "tau 0" else model.set_prior(torch.tensor(density.prior()).float())
    stage_two(model.to("meta") if case == "meta" else model, "crt")  # warnings are errors here
