from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import CLASS_DENSITY, classes, net, seeded
from torch import Tensor, nn

from dir_toolkit.heads.affinity import AffinityHead
from dir_toolkit.heads.linear import LinearHead
from dir_toolkit.losses.affinity import affinity_loss
from dir_toolkit.losses.cross_entropy import cross_entropy, logit_adjusted_cross_entropy
from dir_toolkit.priors import adjust_logits, class_prior


def class_batch(samples: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 3, generator=generator), torch.randint(4, (samples,), generator=generator)


def test_classes_with_a_linear_head_are_the_classifier_to_the_bit() -> None:
    x, y = class_batch()
    model = classes()

    plain = seeded(lambda: nn.Sequential(net(), LinearHead(6, 4)))
    out, scores = model(x, y), plain(x)
    assert torch.equal(out.scores, scores)
    assert torch.equal(out.loss, cross_entropy(scores, y))
    assert torch.equal(out.prediction, scores.argmax(1))
    assert out.prediction.dtype == torch.int64
    assert torch.equal(out.distribution, scores.softmax(1))
    weight = torch.linspace(0.5, 2, len(y))
    assert torch.equal(model(x, y, weight).loss, cross_entropy(scores, y, weight))
    out.loss.backward()
    cross_entropy(scores, y).backward()
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert own.grad is not None
        assert torch.equal(own.grad, other.grad)


@pytest.mark.parametrize("target", ["uniform", [0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.0, 0.0]])
@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0])
def test_an_adjusted_model_is_adjusted_logits_to_the_bit(target: Any, tau: float) -> None:
    x, _ = class_batch()
    prior = class_prior(CLASS_DENSITY)
    for model in (classes(target_prior=target, tau=tau), classes()):
        model.set_prior(target, tau)
        out = model(x)
        adjusted = adjust_logits(out.scores, prior, target=target, tau=tau)
        assert torch.equal(out.distribution, adjusted.softmax(1))
        assert torch.equal(out.prediction, adjusted.argmax(1))
    model.set_prior(None)
    assert torch.equal(model(x).distribution, out.scores.softmax(1))


def test_adjusted_in_the_loss_is_the_logit_adjusted_loss_to_the_bit() -> None:
    x, y = class_batch()
    model = classes(target_prior="uniform", tau=0.7, adjust="in_loss")
    out = model(x, y)
    assert torch.equal(out.loss, logit_adjusted_cross_entropy(out.scores, y, class_prior(CLASS_DENSITY), 0.7))
    assert torch.equal(out.distribution, out.scores.softmax(1))
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4])
    towards = classes(target_prior=shares, tau=0.7, adjust="in_loss")
    expected = cross_entropy(
        out.scores - adjust_logits(torch.zeros(4), class_prior(CLASS_DENSITY), target=shares, tau=0.7), y
    )
    assert torch.equal(towards(x, y).loss, expected)


def test_a_prior_chosen_later_undoes_the_one_in_the_loss() -> None:
    x, y = class_batch()
    prior = class_prior(CLASS_DENSITY)
    model = classes(target_prior="uniform", tau=0.7, adjust="in_loss")
    scores, loss = model(x).scores, model(x, y).loss
    model.set_prior("uniform", 0.7)
    assert torch.equal(model(x).distribution, scores.softmax(1))
    model.set_prior(None)
    torch.testing.assert_close(model(x).distribution, (scores + 0.7 * prior.log().float()).softmax(1))
    model.set_prior("uniform", 0.5)
    torch.testing.assert_close(model(x).distribution, (scores + 0.2 * prior.log().float()).softmax(1))
    assert torch.equal(model(x, y).loss, loss)  # what training sees has not changed


def test_affinity_over_classes_is_its_loss_and_diversity_to_the_bit() -> None:
    x, y = class_batch()
    model = classes(head="affinity")
    out = model(x)
    assert isinstance(model.head, AffinityHead)
    assert model.head.num_prototypes == 5
    assert torch.equal(out.scores, model.head(out.features))
    assert torch.equal(model.criterion(out, y), affinity_loss(out.scores, y) + model.head.diversity())
    assert torch.equal(out.prediction, out.scores.argmax(1))
    torch.testing.assert_close(out.distribution, out.scores / out.scores.sum(1, keepdim=True))


def test_temperature_divides_scores_first() -> None:
    x, _ = class_batch()
    model = classes(temperature=2.0)
    model.set_prior("uniform", 0.5)  # the temperature stays
    out = model(x)
    assert torch.equal(out.distribution, adjust_logits(out.scores / 2, class_prior(CLASS_DENSITY), tau=0.5).softmax(1))
    model.set_prior("uniform", 0.5, temperature=4.0)
    assert torch.equal(
        model(x).distribution, adjust_logits(out.scores / 4, class_prior(CLASS_DENSITY), tau=0.5).softmax(1)
    )
