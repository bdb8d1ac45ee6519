"""Advice that names what to use works when it is followed: each such sentence is provoked, read, and done.

A sentence of the files named in FILES that begins with "Use" and is provoked by no test here fails the last test.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dir_toolkit as dt
from dir_toolkit import Bins, _checks
from dir_toolkit.labels.kernels import laplace, smooth, triangular

FILES = ("_checks.py", "labels/bins.py", "labels/soft_labels.py", "labels/kernels.py", "labels/decoding.py")

heard: list[str] = []


def advice(call: Callable[[], object], pattern: str) -> re.Match[str]:
    """What the error of this call says is to be done."""
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    heard.append(str(caught.value))
    result = re.search(pattern, str(caught.value))
    assert result, str(caught.value)
    return result


def done(code: str, **names: Any) -> Any:
    return eval(code, {"numpy": np, "torch": torch, "dt": dt, "dir_toolkit": dt, **names})


AXES: list[tuple[Any, Any, Any]] = [
    (0, 611.657, 10),
    (0, 10, 3),
    (-3.89942, 3.0660367012023926, 0.1),
    (0.12345678901234567, 6.2, 0.1),
    (1, 1.3, 0.1 + 1e-9),
    (0.1, 0.15, 7),
    (-1e-7, 1e-7, 0.3e-8),
    (1e9 + 0.1, 1e9 + 10, 0.4),
    *((*np.random.default_rng(seed).lognormal(sigma=2, size=2).cumsum(), 0.25) for seed in range(20)),
    *(
        (*np.random.default_rng(seed).lognormal(sigma=2, size=2).cumsum().astype(np.float32), np.float32(0.1))
        for seed in range(40)
    ),
]


@pytest.mark.parametrize(("low", "high", "width"), AXES)
def test_advice_mends_a_width_that_does_not_divide(low: Any, high: Any, width: Any) -> None:
    result = advice(
        lambda: Bins.uniform(low, high, width=width),
        r"Use count=(?P<count>\d+)(, or (low=(?P<low>\S+) and )?high=(?P<high>\S+))?\.$",
    )
    axes = [Bins.uniform(low, high, count=int(result["count"]))]
    if result["high"]:
        axes.append(Bins.uniform(float(result["low"]) if result["low"] else low, float(result["high"]), width=width))
        np.testing.assert_allclose(np.diff(axes[1].edges), float(str(width)), rtol=1e-4)
    else:
        assert len(str(width)) > 6  # only where no decimals are to be had
    for bins in axes:
        for kind in (np.float32, np.float64) if high < 1e6 else (np.float64,):
            index = bins.index(np.array([low, high], dtype=kind))
            assert index[0] <= 1
            assert index[1] >= len(bins) - 2
        assert bins.edges[0] <= float(low) < float(high) <= bins.edges[-1]


def test_whole_numbers_need_a_width_of_one() -> None:
    wanted = r"Use a width of at least (\S+), or integer=False\.$"
    result = advice(lambda: Bins.uniform(0, 3, width=0.5, integer=True), wanted)
    assert len(Bins.uniform(0, 3, width=float(result[1]), integer=True)) == 3


@pytest.mark.parametrize("edges", [[0, 1, 1, 2], [2, 0, 1], [1, 0.0, -0.0]])
def test_advice_mends_edges_that_do_not_rise(edges: list[float]) -> None:
    result = advice(lambda: Bins.from_edges(edges), r"Use (\S+)\.$")
    assert Bins.from_edges(done(result[1], edges=edges)).edges.tolist() == sorted({x + 0.0 for x in edges})


@pytest.mark.parametrize("size", [2, 10, 10_000_000])
@pytest.mark.parametrize("window", [lambda n: dt.gaussian(n, 2), triangular, lambda n: laplace(n, 2)])
def test_advice_mends_windows_of_even_size(window: Callable[[int], np.ndarray], size: int) -> None:
    result = advice(lambda: window(size), r"Use (\d+)(?: or (\d+))?\.$")
    for other in filter(None, result.groups()):
        assert len(window(int(other))) == int(other)


def test_advice_mends_windows_for_an_axis() -> None:
    values = np.ones(4)
    result = advice(lambda: smooth(values, np.ones((3, 3))), r"Use (dir_toolkit\S+ 2\))\.$")
    assert len(done(result[1])) == 5
    for bins in (1, 4, 5, 8):
        result = advice(lambda n=bins: smooth(np.ones(n), dt.gaussian(9, 2)), r"Use at most (\d+)\.$")
        assert smooth(np.ones(bins), dt.gaussian(int(result[1]), 2)).shape == (bins,)


def test_advice_mends_tensors_that_are_not_plain() -> None:
    bins = Bins.uniform(0, 4, width=1)
    result = advice(lambda: dt.soft_labels([1.0, 2.0], bins, None), r"Use (torch.as_tensor\(labels\))\.$")  # type: ignore[arg-type]
    assert dt.soft_labels(done(result[1], labels=[1.0, 2.0]), bins, None).shape == (2, 4)
    with warnings.catch_warnings():  # torch's own, which it gives once in a process
        warnings.simplefilter("ignore", UserWarning)
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.quint8)
    nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(1)], layout=torch.jagged)
    for labels, code in (
        (torch.ones(2).to_sparse(), r"labels\.to_dense\(\)"),
        (quantized, r"labels\.dequantize\(\)"),
        (nested, r"torch\.cat\(labels\.unbind\(\)\)"),
        (np.ma.array([1.0, 1.0, 9.0], mask=[False, False, True]), r"labels\.compressed\(\)"),
    ):
        result = advice(lambda y=labels: bins.index(y), rf"Use ({code})\.$")
        assert bins.index(done(result[1], labels=labels)).tolist() == [1, 1]


def test_advice_mends_outputs_as_scores() -> None:
    density = dt.LabelDensity(Bins.classes(2), [3, 1])
    model = dt.LongTailModel(torch.nn.Identity(), 2, density.bins, density=density)
    output, labels = model(torch.eye(2)), torch.tensor([0, 1])
    result = advice(lambda: model.choose_tau(output, labels), r"Use (output\.scores)\.$")
    assert model.choose_tau(done(result[1], output=output), labels).samples == 2


def test_advice_mends_windows_in_label_units() -> None:
    for bins, size in ((Bins.uniform(0, 100, width=5), 200), (Bins.uniform(0, 4.5, width=0.5), 5)):
        result = advice(lambda b=bins, s=size: dt.LDS(b, kernel=dt.gaussian(s, 1, unit="label")), r"most (\S+)\.$")
        dt.LDS(bins, kernel=dt.gaussian(done(result[1]), 1, unit="label")).fit(bins.centers)


def test_advice_mends_masks_as_weights() -> None:
    mask = torch.tensor([True, False])
    result = advice(lambda: dt.weighted_l1(torch.ones(2), torch.zeros(2), mask), r"Use (weight\.float\(\))\.$")
    assert dt.weighted_l1(torch.ones(2), torch.zeros(2), done(result[1], weight=mask)).item() == 0.5


def test_advice_mends_classes_that_are_not_int64() -> None:
    logits, target = torch.eye(2), torch.tensor([0, 1], dtype=torch.int32)
    result = advice(lambda: dt.losses.cross_entropy(logits, target), r"Use (target\.long\(\))\.$")
    assert dt.losses.cross_entropy(logits, done(result[1], target=target)).item() < 0.4


def test_advice_mends_tensors_on_several_devices() -> None:
    class DTensor(torch.Tensor):
        def to_local(self) -> torch.Tensor:
            return self.as_subclass(torch.Tensor)

        full_tensor = to_local

    labels, bins = torch.ones(2).as_subclass(DTensor), Bins.uniform(0, 4, width=1)
    result = advice(lambda: bins.index(labels), r"Use (labels\S+\)), or (labels\S+\))\.$")
    for code in result.groups():
        assert bins.index(done(code, labels=labels)).tolist() == [1, 1]


def test_advice_mends_shapes_and_devices() -> None:
    pred, target = torch.ones(3, 1), torch.ones(3)
    for a, b in ((pred, target), (target, pred), (torch.ones(2, 3, 1), torch.ones(2, 3))):
        result = advice(lambda a=a, b=b: dt.weighted_l1(a, b), r"Use ((pred|target)\.squeeze\(\d\))\.$")
        mended = {"pred": a, "target": b}
        mended[result[2]] = done(result[1], **mended)
        dt.weighted_l1(**mended)
    far = target.to("meta")
    result = advice(lambda: _checks.same_device(pred=target, target=far), r"Use (target\.to\(pred\.device\))\.$")
    assert "meta" in str(far.device)
    assert result[1] == "target.to(pred.device)"


def test_advice_mends_priors() -> None:
    for prior, zeros in (([0.5, 0.5, 0.0], False), ([30.0, 20.0, 10.0], False), ([0.6, 0.6, -0.2], True)):
        values = torch.tensor(prior)
        result = advice(lambda p=values, z=zeros: _checks.prior_shares("prior", p, zeros=z), r"Use (dt\S+( \S+)?),")
        shares = done(result[1], counts=[30, 20, 10])
        _checks.prior_shares("prior", torch.as_tensor(shares), zeros=zeros)


def test_classes_decode_by_their_mode() -> None:
    p, bins = torch.tensor([[0.2, 0.8]]), Bins.classes(2)
    for call in (dt.decode, lambda p, bins: dt.labels.quantiles(p, bins, 0.5), dt.interval):
        result = advice(lambda c=call: c(p, bins), r"Use decode\(\.\.\., (point=\"mode\")\), or Bins\.uniform")
        assert done(f"dt.decode(p, bins, {result[1]})", p=p, bins=bins).tolist() == [1]


def test_advice_mends_labels_of_other_kinds() -> None:
    bins = Bins.uniform(0, 4, width=1)
    for labels in (np.ma.masked_array([1.0, 2.0], [False, True]), ["1", "2"]):
        result = advice(
            lambda y=labels: dt.LabelDensity.count(y, bins), r"Use (labels\.compressed\(\)|numpy\S+ \S+\)),?"
        )
        counted = dt.LabelDensity.count(done(result[1], labels=labels, numpy=np), bins)
        assert counted.counts[1] == 1


def test_classes_have_shares_already() -> None:
    bins, points, levels = Bins.classes(2), np.array([0.0, 1.0]), np.array([0.0, 1.0])
    result = advice(lambda: dt.labels.bin_shares(points, levels, bins), r"Use the (.*) of the classes themselves\.")
    assert result[1] == "probabilities"


def patterns(file: Path) -> list[str]:
    """The sentences of a file that begin with "Use", what they fill in standing for anything."""
    parts = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            pieces = [re.escape(v.value) if isinstance(v, ast.Constant) else ".*" for v in node.values]
            parts.append("".join(map(str, pieces)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts.append(re.escape(node.value))
    return [part for part in parts if part.startswith("Use\\ ")]


def test_every_such_sentence_was_followed(request: pytest.FixtureRequest) -> None:
    run = {item.name.partition("[")[0] for item in request.session.items}
    if not {name for name in globals() if name.startswith("test_")} <= run:
        pytest.skip("needs all other tests of this file")
    package = Path(dt.__file__).parent
    expected = {pattern: name for name in FILES for pattern in patterns(package / name)}
    assert len(expected) >= 12
    assert [p for p in expected if not any(re.search(p, sentence) for sentence in heard)] == []
