"""What every loss promises, tested in one place: a test file declares its loss, and adds values worked out by hand."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.testing import assert_close

from dir_toolkit._settings import described
from dir_toolkit.errors import DirToolkitError, LabelError, ShapeError

Batch = dict[str, Tensor]


def close(given: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert_close(given, expected, rtol=tolerance, atol=tolerance)


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """All floats of a batch in another dtype."""
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}


def rows_at(batch: Batch, index: Any) -> Batch:
    return {name: x[index] for name, x in batch.items()}


class LossTester:
    """A class ``TestX(LossTester)`` declares a loss; pytest runs what is below, and what the class adds.

    ``variants`` names sets of options, which the function and the module's constructor take alike.
    """

    function: Callable[..., Tensor]
    module: Any = None
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}
    n = 12  # samples
    rows = "pred"  # what the first argument is called
    reads = "prediction"  # what the module takes of an output
    whole = False  # whether a sample's term depends on other samples
    classes = False  # whether targets are class indices
    soft = False  # whether targets are distributions
    floor: float | None = 0.0  # below which no sample's value falls
    several = False  # whether a label may be several numbers
    copies = False  # whether it takes arrays, which a compiled graph cannot
    needs_two = False  # whether a single sample is warned of

    def batch(self, n: int = 12) -> Batch:
        """``rows``, ``target``, ``weight`` and what else has one entry per sample, in float64."""
        raise NotImplementedError

    def oracle(self, rows: Any, target: Any, **options: Any) -> float:
        """One sample's loss in plain Python, of the lists ``rows`` and ``target``; a loss of the batch has its own."""
        raise NotImplementedError

    def each(self, options: Mapping[str, Any], batch: Batch, *, weighted: bool = False) -> Tensor:
        """Every sample's loss, (N,), by the oracle, with its weight or without."""
        pairs = zip(batch["rows"].tolist(), batch["target"].tolist(), strict=True)
        values = torch.tensor([self.oracle(row, y, **options) for row, y in pairs], dtype=torch.float64)
        return values * batch["weight"] if weighted else values

    def wild(self, rows: Tensor, size: float) -> Tensor:
        """Rows at the end of their range."""
        return rows.sign() * size

    def call(self, options: Mapping[str, Any], batch: Batch, **more: Any) -> Tensor:
        given: dict[str, Any] = {**batch, **options, **more}
        return self.function(given.pop("rows"), **given)

    def plain(self, options: Mapping[str, Any], batch: Batch, **more: Any) -> Tensor:
        """Without weights."""
        return self.call(options, {name: x for name, x in batch.items() if name != "weight"}, **more)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "options" in metafunc.fixturenames:
            metafunc.parametrize("options", list(self.variants.values()), ids=list(self.variants))

    def test_it_equals_the_oracle(self, options: Any) -> None:
        for n in (2, 3, self.n) if self.needs_two else (1, 2, self.n):
            batch = self.batch(n)
            values, weighted = self.each(options, batch), self.each(options, batch, weighted=True)
            close(self.plain(options, batch, reduction="none"), values)
            close(self.plain(options, batch), values.mean())
            close(self.call(options, batch, reduction="none"), weighted)
            close(self.call(options, batch), weighted.sum() / n)  # by N, not by the sum of weights
            close(self.call(options, batch, reduction="sum"), weighted.sum())

    def test_the_oracle_tells_variants_apart(self) -> None:
        batch = self.batch(self.n)
        sums = [round(self.each(options, batch).sum().item(), 9) for options in self.variants.values()]
        assert len(set(sums)) == len(sums)
        if self.module is not None:  # and so does what a checkpoint calls the module by
            text = {str(described("it", self.module(**options))) for options in self.variants.values()}
            assert len(text) == len(sums) or not isinstance(self.module, type)
        first = self.each(next(iter(self.variants.values())), batch)
        assert first.shape == (self.n,)
        assert (first != 0).sum() > self.n / 4

    def test_gradients_agree_with_differences(self, options: Any) -> None:
        batch = self.batch(6)
        batch["weight"][2] = 0
        rows = batch.pop("rows").requires_grad_()
        assert torch.autograd.gradcheck(lambda x: self.call(options, {"rows": x, **batch}), rows)

    def test_weight_two_is_seen_twice_and_order_does_not_matter(self, options: Any) -> None:
        batch = self.batch(self.n)
        again, doubled = [*range(self.n), 3, 7], {**batch, "weight": batch["weight"].clone()}
        doubled["weight"][[3, 7]] *= 2
        if not self.whole:
            twice = self.call(options, rows_at(batch, again), reduction="sum")
            close(self.call(options, doubled, reduction="sum"), twice)
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(1))
        close(self.call(options, rows_at(batch, order)), self.call(options, batch))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_a_sample_of_weight_zero_leaves_no_trace(self, options: Any, value: float) -> None:
        batch = self.batch(self.n)
        batch["weight"][4] = 0
        rest = torch.arange(self.n) != 4
        expected = self.call(options, rows_at(batch, rest), reduction="sum")
        batch["rows"][4] = value
        for name, x in batch.items():
            if name in ("target", "pred") and x.is_floating_point() and not (self.soft and name == "target"):
                x[4] = value
        own = batch["rows"].clone().requires_grad_()
        result = self.call(options, {**batch, "rows": own}, reduction="sum")
        close(result, expected)
        result.backward()
        assert own.grad is not None
        assert (own.grad[4] == 0).all()
        assert own.grad[rest].isfinite().all()

    def test_a_missing_label_is_refused_by_its_place_and_a_broken_row_shows(self, options: Any) -> None:
        batch = self.batch(self.n)
        broken = {**batch, "rows": batch["rows"].clone()}
        broken["rows"][slice(None) if self.whole else 3] = torch.nan
        assert self.call(options, broken).isnan()
        if not self.classes and not self.soft:
            target = batch["target"].double()
            target[3] = torch.nan
            with pytest.raises(DirToolkitError, match=r"target must (be finite|not be NaN), got nan at index \[3"):
                self.call(options, {**batch, "target": target})

    def test_dropped_labels_are_no_samples(self, options: Any) -> None:
        if self.classes:
            return
        batch, gone = self.batch(self.n), torch.arange(self.n) % 5 == 1
        batch["target"] = batch["target"].double()
        holes = {**batch, "target": batch["target"].clone(), "weight": batch["weight"].masked_fill(gone, torch.nan)}
        holes["target"][gone] = torch.nan
        if holes["target"].ndim > 1:
            holes["target"][6] = 0.0 if self.soft else batch["target"][6]
            holes["target"][6, 0] = torch.nan  # one number of a label is enough
        holes["rows"] = batch["rows"].masked_fill(gone.view(-1, *(1,) * (batch["rows"].ndim - 1)), torch.nan)
        rest = rows_at(batch, ~gone)
        for reduction in ("mean", "sum"):
            own = [one["rows"].clone().requires_grad_() for one in (holes, rest)]
            for call in (self.call, self.plain):
                given, right = (
                    call(options, {**one, "rows": rows}, reduction=reduction, missing=missing)
                    for one, rows, missing in zip((holes, rest), own, ("drop", "raise"), strict=True)
                )
                close(given, right)
                given.backward(), right.backward()
            close(own[0].grad[~gone], own[1].grad)
            assert (own[0].grad[gone] == 0).all()
        each = self.call(options, holes, reduction="none", missing="drop")
        close(each[~gone], self.call(options, rest, reduction="none"))
        assert (each[gone] == 0).all()
        none = {**batch, "target": batch["target"] * torch.nan, "rows": batch["rows"].clone().requires_grad_()}
        for reduction in ("none", "mean", "sum"):
            value = self.call(options, none, reduction=reduction, missing="drop")
            assert (value == 0).all()
            value.sum().backward()
        assert (none["rows"].grad == 0).all()
        close(self.call(options, batch, missing="drop"), self.call(options, batch))  # where none is missing
        half = self.call(options, cast(holes, torch.float16), missing="drop")
        close(half, self.call(options, cast(rest, torch.float16)).float(), 1e-5)
        if not self.copies and options == next(iter(self.variants.values())):  # one graph, without a look at values
            torch._dynamo.reset()
            given = {
                k: torch.as_tensor(v, dtype=torch.float64) if isinstance(v, list) else v for k, v in options.items()
            }
            call = torch.compile(partial(self.call, given, missing="drop"), fullgraph=True, backend="eager")
            close(call(holes), self.call(options, rest))
        if self.module is not None:
            module, plain = self.module(**options, missing="drop").double(), self.module(**options).double()
            close(module(holes["rows"], holes["target"], holes["weight"]), self.call(options, rest), 1e-6)
            close(module(holes["rows"], holes["target"]), plain(rest["rows"], rest["target"]), 1e-6)
        for word in ("skip", None, True):
            with pytest.raises(
                ValueError, match=f"^{self.function.__name__}: missing must be one of 'raise', 'drop', got"
            ):
                self.call(options, holes, missing=word)
        with pytest.raises(ShapeError, match="weight"):
            self.call(options, {**holes, "weight": holes["weight"][:1]}, missing="drop")
        with pytest.raises(TypeError, match="weight"):
            self.call(options, {**holes, "weight": ~gone}, missing="drop")
        if not self.soft:
            infinite = {**holes, "target": holes["target"].clone()}
            infinite["target"][0] = torch.inf
            with pytest.raises(DirToolkitError, match=r"target must .*inf at index \[0"):
                self.plain(options, infinite, missing="drop")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_lower_precision_is_raised(self, options: Any, dtype: torch.dtype) -> None:
        low = cast(self.batch(self.n), dtype)
        options = {name: x.float() if isinstance(x, Tensor) else x for name, x in options.items()}
        copies, state = {name: x.clone() for name, x in low.items()}, torch.get_rng_state()
        result = self.call(options, low)
        assert result.dtype == torch.float32
        assert all(torch.equal(x, copies[name]) for name, x in low.items())  # inputs stay as they are
        assert torch.equal(torch.get_rng_state(), state)
        wide = cast(low, torch.float32)
        # A distribution in half precision may miss the sum of one by more than one in float32.
        close(result, self.call(options, {**wide, "target": low["target"]} if self.soft else wide), 1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            close(self.call(options, low), result, 1e-6)
        assert self.call(options, {**low, "rows": low["rows"].double()}).dtype == torch.float64

    def test_rows_at_the_end_of_their_range_stay_finite(self, options: Any) -> None:
        batch = cast(self.batch(self.n), torch.float32)
        for size in (1e3, 1e6, 1e15):
            wild = self.wild(batch["rows"], size).requires_grad_()
            values = self.plain(options, {**batch, "rows": wild}, reduction="none")
            assert values.isfinite().all()
            assert self.floor is None or (values > self.floor - 1e-4 * max(1, abs(self.floor))).all()
            values.sum().backward()
            assert wild.grad is not None
            assert wild.grad.isfinite().all()

    def test_transforms_of_torch_func_give_the_same_gradients(self, options: Any) -> None:
        batch = self.batch(8)
        rows, target, weight = batch["rows"], batch["target"], batch["weight"]
        own = rows.clone().requires_grad_()
        self.call(options, {**batch, "rows": own}).backward()
        assert own.grad is not None
        close(grad(lambda x: self.call(options, {**batch, "rows": x}))(rows), own.grad)
        if not self.whole:
            each = vmap(
                grad(lambda x, y, w: self.call(options, {"rows": x[None], "target": y[None], "weight": w[None]}))
            )
            close(each(rows, target, weight), own.grad * len(rows))
            by_weight = grad(lambda w: self.call(options, {**batch, "weight": w}, reduction="sum"))(weight)
            close(by_weight, self.plain(options, batch, reduction="none"))

    def test_it_is_one_graph_and_accelerators_are_not_read(self) -> None:
        variants = [
            {
                name: torch.as_tensor(value, dtype=torch.float64) if isinstance(value, list) else value
                for name, value in options.items()
            }
            for options in self.variants.values()
        ]
        batch = self.batch(self.n)
        meta = {name: x.to("meta") for name, x in batch.items()}
        for options in variants:
            own = {
                name: x.to("meta") if isinstance(x, Tensor) and not self.copies else x for name, x in options.items()
            }
            assert self.call(own, meta).device.type == "meta"
        if self.copies:
            return
        expected = [self.call(options, batch) for options in variants]
        torch._dynamo.reset()  # which would take an option that it has seen with another value for a variable
        each = torch.compile(lambda b: [self.call(o, b) for o in variants], fullgraph=True, backend="eager")
        close(torch.stack(each(batch)), torch.stack(expected))
        with torch.device("meta"):  # a default device changes nothing
            assert all(torch.equal(self.call(o, batch), value) for o, value in zip(variants, expected, strict=True))

    def test_its_module_gives_the_mean_and_survives_copies(self, options: Any) -> None:
        if self.module is None:
            pytest.skip("it has tests of its own")
        batch = self.batch(self.n)
        rows, target, weight = batch["rows"], batch["target"], batch["weight"]
        module = self.module(**options).double()
        output = SimpleNamespace(**{self.reads: rows})
        for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            close(twin(rows, target, weight), self.call(options, batch), 1e-6)
            close(twin(output, target), self.plain(options, batch), 1e-6)
        other = self.module(**options).double()
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(rows, target), module(rows, target))
        assert repr(module).startswith(type(module).__name__ + "(")
        assert module.settings.keys() >= options.keys() or not isinstance(self.module, type)
        half = self.module(**options).bfloat16()  # which rounds no buffer
        assert all(x.dtype != torch.bfloat16 for x in half.buffers())
        with pytest.raises(
            TypeError, match=rf"^{type(module).__name__}: output must be a torch\.Tensor, or hold one as"
        ):
            module([1.0], target)

    def test_arguments_are_refused_by_name(self) -> None:
        options = next(iter(self.variants.values()))
        batch = self.batch(self.n)
        rows, target, weight = batch["rows"], batch["target"], batch["weight"]

        def refused(error: type[Exception], rule: str, **changes: Any) -> None:
            with pytest.raises(error, match=f"^{self.function.__name__}: {rule}") as caught:
                self.call(options, {**batch, **changes})
            assert isinstance(caught.value, DirToolkitError)

        for value in (None, rows.tolist(), rows.numpy(), "rows", 1.0):
            refused(TypeError, rf"{self.rows} must be a torch\.Tensor, got", rows=value)
            refused(TypeError, r"target must be a torch\.Tensor, got", target=value)
            if value is not None:
                refused(TypeError, r"weight must be a torch\.Tensor, got .* Use torch\.as_tensor", weight=value)
        refused(TypeError, f"{self.rows} must be floats, got dtype torch.int64", rows=rows.long())
        refused(TypeError, r"target must .*, got dtype torch\.bool", target=target > 0)
        refused(
            TypeError,
            r"weight must be integers or floats, got dtype torch\.bool\. Use weight\.float",
            weight=weight > 1,
        )
        refused(TypeError, "weight must be integers or floats, got dtype", weight=weight.to(torch.complex64))
        refused(TypeError, "weight must be dense", weight=weight.to_sparse())
        for value in (math.nan, math.inf):
            bad = weight.clone()
            bad[3] = value
            refused(ValueError, rf"weight must be finite, got {value} at index \[3\]", weight=bad)
        refused(ValueError, "weight must not be negative, got a minimum of -1", weight=-torch.ones(self.n))
        refused(ValueError, r".*must be on the same device, got cpu and meta", target=target.to("meta"))
        refused(ValueError, r".*must be on the same device, got cpu and meta", weight=weight.to("meta"))
        refused(ShapeError, "", target=target[:5])
        refused(ShapeError, r".*weight .*\. Use weight\.squeeze\(1\)\.$", weight=weight[:, None])
        refused(ShapeError, ".*weight", weight=weight[0])
        for name, x in batch.items():
            if name not in ("rows", "weight") and x.ndim == 1 and not self.several:
                refused(ShapeError, rf".*{name}.*Use (pred|{name})\.squeeze\(1\)\.$", **{name: x[:, None]})
        with pytest.raises(ValueError, match=f"^{self.function.__name__}: .* must hold at least one value, got shape"):
            self.call(options, rows_at(batch, slice(0)))
        for value in ("avg", None, True):
            with pytest.raises(ValueError, match="reduction must be one of 'none', 'mean', 'sum', got"):
                self.call(options, batch, reduction=value)
        if self.classes:
            for value in (-1, 100, -100):
                bad = target.clone()
                bad[[5, 8]] = value
                with pytest.raises(
                    LabelError, match=rf"target must hold class indices from 0 to \d, got {value} at index \[5"
                ):
                    self.call(options, {**batch, "target": bad})
            refused(TypeError, r"target must hold class indices as int64, got .* target\.long\(\)", target=target.int())
            assert self.call(options, batch).isfinite()
