"""The error sentences and what callers may pass; every function's own arguments are tested in its own file."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import dir_toolkit as dt
from dir_toolkit import DirToolkitError, DirToolkitWarning, _checks
from dir_toolkit._numerics import readable
from dir_toolkit.errors import ArgumentError, ArgumentTypeError, LabelError, MissingPackageError, ShapeError


def test_a_sentence_says_who_the_rule_what_came_and_what_to_do() -> None:
    error = _checks.problem("x must be 1", got=2, fix="Use 1.", error=ShapeError)
    assert type(error) is ShapeError
    assert str(error) == "dir_toolkit: x must be 1, got 2. Use 1."
    assert str(_checks.problem("x must be 1")) == "dir_toolkit: x must be 1."
    assert type(_checks.label_problem("x", got=1)) is LabelError


@pytest.mark.parametrize(
    ("got", "error", "sentence"),
    [
        (torch.ones(2, 3).shape, ShapeError, "got shape (2, 3)"),
        (np.ones(2).shape, ShapeError, "got shape (2,)"),
        (torch.int64, ArgumentTypeError, "got dtype torch.int64"),
        (np.dtype(">f4"), ArgumentTypeError, "got dtype >f4"),
        (list, ArgumentTypeError, "got list"),
        (0, ArgumentError, "got 0"),
    ],
)
def test_a_shape_a_dtype_and_a_class_say_themselves_what_they_are(got: object, error: type, sentence: str) -> None:
    with pytest.raises(DirToolkitError, match=re.escape(f": x must be 1, {sentence}.")) as caught:
        _checks.require(False, "x must be 1", got=got)
    assert type(caught.value) is error
    assert "of one shape, got (2,)." in str(_checks.problem("x must be of one shape", got=(2,)))
    assert type(_checks.problem("x", got=got, error=ImportError)) is MissingPackageError


def test_what_a_sentence_needs_is_asked_for_only_if_it_is_said() -> None:
    def never() -> str:
        raise AssertionError

    _checks.require(True, never, got=never, fix=never)
    with pytest.raises(ArgumentError, match=r"^\S+: x must be 1, got 2\. Use 1\.$"):
        _checks.require(False, lambda: "x must be 1", got=lambda: 2, fix=lambda: "Use 1.")


def test_warnings_are_ours() -> None:
    with pytest.warns(DirToolkitWarning, match=r"^\S+: be careful$"):
        _checks.warn("be careful")


BINS = dt.Bins.uniform(0, 4, width=1)


class Mine(dt.LDS):
    """A class of the user's, derived from one of ours."""


class Users(nn.Module):
    """A module of the user's that calls a function of ours."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dt.weighted_l1(x, x[:, 0])


@pytest.mark.parametrize(
    ("who", "call"),
    [
        ("weighted_l1", lambda: dt.weighted_l1(torch.ones(2, 1), torch.ones(2))),
        ("weighted_l1", functools.partial(dt.weighted_l1, torch.ones(2, 1), torch.ones(2))),
        ("weighted_l1", torch.no_grad()(lambda: dt.weighted_l1(torch.ones(2, 1), torch.ones(2)))),
        ("weighted_l1", lambda: Users()(torch.ones(2, 1))),
        ("weighted_l1", lambda: nn.Sequential(Users())(torch.ones(2, 1))),
        ("LabelDensity.prior", lambda: dt.LabelDensity(BINS, [1, 0, 0, 0]).prior(floor=-1)),
        ("Bins.index", lambda: BINS.index(torch.tensor([9.0]))),  # private methods are passed over
        ("LDS.fit", lambda: dt.LDS(BINS).fit([9.0])),  # and public ones that the user did not call
        ("Mine.fit", lambda: Mine(BINS).fit([9.0])),
        ("Bins.quantile", lambda: dt.Bins.quantile([], 3)),
        (r"(Bins\.)?grid", lambda: dt.Bins.grid()),  # Python 3.10 does not tell the class of a static method
        ("LDS", lambda: dt.LDS(3)),  # type: ignore[arg-type]
        ("LinearHead", lambda: dt.heads.LinearHead(3, 2)(torch.ones(2, 4))),
        ("LinearHead", lambda: nn.Sequential(dt.heads.LinearHead(3, 2))(torch.ones(2, 4))),
        ("dir_toolkit", lambda: _checks.whole("x", -1, low=0)),  # nobody of ours is between
    ],
)
def test_an_error_names_what_the_user_called(who: str, call: Callable[[], object]) -> None:
    with pytest.raises(DirToolkitError, match=rf"^{who}: "):
        call()


def test_a_warning_points_at_the_line_of_the_user() -> None:
    def call() -> None:
        dt.LDS(dt.Bins.uniform(0, 20, width=1)).fit([0.5] * 90 + [1.5] * 10)

    with pytest.warns(DirToolkitWarning, match=r"^LDS\.fit: 90% of the labels") as caught:
        call()
    assert caught[0].filename == __file__
    assert caught[0].lineno == call.__code__.co_firstlineno + 1


def test_checks_that_pass_break_no_graph() -> None:
    def checked(x: torch.Tensor) -> torch.Tensor:
        _checks.is_tensor(x=x)
        _checks.same_shape(x=x, y=x)
        _checks.finite(x=x)
        _checks.require(len(x) > 1, "x must be long", got=lambda: x.shape, fix=lambda: f"Use {x.shape}.")
        return x + _checks.number("one", 1, low=0)

    compiled = torch.compile(checked, fullgraph=True, dynamic=True, backend="eager")
    assert [compiled(torch.ones(n)).sum() for n in (2, 3)] == [4, 6]


def test_a_check_that_fails_in_a_compiled_function_says_who() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: dt.weighted_l1(x, x[:, 0]) + 1, backend="eager")
    with pytest.raises(ShapeError, match=r"^weighted_l1: pred and target must have the same shape"):
        compiled(torch.ones(2, 1))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "must be a number, got True"),
        ("1", "must be a number, got '1'"),
        (None, "must be a number, got None"),
        (1j, "must be a number"),
        (torch.tensor(1.0), "must be a number"),
        (float("nan"), "must be > 0 and <= 2, got nan"),
        (0, "must be > 0 and <= 2, got 0"),
        (2.5, "must be > 0 and <= 2, got 2.5"),
        (10**400, r"must fit into float64, got a larger int"),
    ],
)
def test_number_refuses_other_values(value: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^\S+: x {message}"):
        _checks.number("x", value, low=0, high=2, open_low=True)


def test_number_takes_every_real() -> None:
    for value in (1, 1.0, np.float32(1), np.int8(1)):
        assert type(_checks.number("x", value, low=0)) is float
    with pytest.raises(ValueError, match=r"^\S+: x must be finite, got inf"):
        _checks.number("x", np.inf)


def test_a_number_for_float32_is_held_by_it_in_full() -> None:
    for value in (1e39, -1e39, 1e-50, 1e-39):  # infinite, zero and subnormal there
        with pytest.raises(
            ValueError,
            match=rf"^\S+: x must fit into float32, from 1.2e-38 to 3.4e.38 in size, got {re.escape(str(value))}",
        ):
            _checks.number("x", value, float32=True)
        assert _checks.number("x", value) == value
    for value in (0, 1.2e-38, 3.4e38, -5.0):
        assert _checks.number("x", value, float32=True) == value


def test_what_has_no_values_is_refused_where_they_are_read() -> None:
    message = r"^\S+: y must hold values, got a tensor on the meta device\. Load or compute it first\.$"
    with pytest.raises(ValueError, match=message):
        _checks.on_host("y", torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match=message):
        _checks.labels_array(torch.zeros(2, device="meta"), "y")
    x = torch.ones(2, requires_grad=True)
    assert not _checks.on_host("x", x).requires_grad


def test_a_prior_is_positive_and_sums_to_one() -> None:
    fix = r"Use dt\.class_prior\(counts{}\), which floors counts and divides by their sum\.$"
    for zeros, value, rule in (
        (False, [0.5, 0.5, 0], "must be positive, got 0 for class 2"),
        (False, [0.5, 0.6, -0.1], "must be positive, got -0.1 for class 2"),
        (True, [0.5, 0.6, -0.1], "must not be negative, got -0.1 for class 2"),
        (True, [1, 1, 0], "must sum to one, got a sum of 2"),
        (False, [1e308] * 3, "must sum to one, got a sum of inf"),
        (False, [0.5, 0.25, 0.249], "must sum to one, got a sum of 0.999"),
    ):
        with pytest.raises(ValueError, match=rf"^\S+: p {rule}\. " + fix.format(", floor=0" if zeros else "")):
            _checks.prior_shares("p", torch.tensor(value, dtype=torch.float64), zeros=zeros)
    with pytest.raises(ValueError, match=r"^\S+: p must be finite, got nan at index \[1\]"):
        _checks.prior_shares("p", torch.tensor([1, torch.nan]))
    _checks.prior_shares("p", torch.tensor([0.5, 0.5, 0]), zeros=True)
    _checks.prior_shares("p", torch.tensor([0.5, 0.25, 0.24999]))
    _checks.prior_shares("p", torch.ones(3, device="meta"))


def test_distributions_sum_to_one_but_for_rounding() -> None:
    for values, rule in (
        ([[0.5, 0.5], [0.5, 0.6]], "must sum to one along the last axis, got sums from 1 to 1.1. Apply softmax"),
        ([[1.5, -0.5]], "must not be negative, got a minimum of -0.5"),
        ([[0.5, math.nan]], r"must be finite, got nan at index \[0, 1\]"),
        ([[0.5, 0.498]], "must sum to one"),
    ):
        with pytest.raises(ValueError, match=rf"^\S+: p {rule}"):
            _checks.distributions(p=torch.tensor(values))
    _checks.distributions(p=torch.tensor([[0.5, 0.498]]).bfloat16(), q=torch.ones(3, 0))
    _checks.distributions(p=torch.ones(3, 2, device="meta"))


def test_whole_one_of_and_interval_refuse() -> None:
    assert _checks.whole("x", np.int64(3)) == 3
    with pytest.raises(TypeError, match=r"^\S+: x must be a whole number, got 3\.0"):
        _checks.whole("x", 3.0)
    with pytest.raises(ValueError, match=r"^\S+: x must be at least 1, got 0"):
        _checks.whole("x", 0, low=1)
    for value in ("c", None, ["a"], np.array(["a", "b"])):
        with pytest.raises(ValueError, match=r"^\S+: x must be one of 'a', 'b', got"):
            _checks.one_of("x", value, ("a", "b"))
    assert _checks.interval("x", (5, np.inf)) == (5.0, np.inf)
    for value in ((1, 1), (2, 1), (-1, 1), (float("nan"), 1), "12", 3, (1,), (True, 2), (1j, 2), ("1", "2"), None):
        with pytest.raises((TypeError, ValueError), match=r"^\S+: x must be a pair \(low, high\) with 0 <= low < high"):
            _checks.interval("x", value)


def test_tensors_are_dense_real_and_on_one_device() -> None:
    x = torch.ones(2)
    with pytest.raises(TypeError, match=r"^\S+: x must be a torch\.Tensor, got list\. Use torch\.as_tensor\(x\)\.$"):
        _checks.is_tensor(x=[1.0])
    with pytest.raises(TypeError, match=r"^\S+: x must be dense, got torch\.sparse_coo\. Use x\.to_dense\(\)\.$"):
        _checks.is_tensor(x=x.to_sparse())
    with pytest.raises(TypeError, match=r"^\S+: x must be integers or floats, got dtype torch\.complex64"):
        _checks.real(x=x.to(torch.complex64))
    with pytest.raises(TypeError, match=r"^\S+: x must be floats, got dtype torch\.int64\.$"):
        _checks.floats(x=x.long())
    with pytest.raises(ValueError, match=r"^\S+: x and y must be on the same device, got cpu and meta\. Use y\.to"):
        _checks.same_device(x=x, y=x.to("meta"))


def test_the_first_value_that_is_not_finite_is_named_by_its_place() -> None:
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    x[1, 0] = x[1, 2] = float("inf")
    with pytest.raises(ValueError, match=re.escape(": x must be finite, got inf at index [1, 0] (2 such values).")):
        _checks.finite(x=x)
    _checks.finite(x=x.to("meta"))  # an accelerator's values are not looked at


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float64, torch.int8])
def test_negative_values_are_found_in_every_signed_kind(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"^\S+: x must not be negative, got a minimum of -2\.$"):
        _checks.not_negative(x=torch.tensor([1.0, -2.0]).to(dtype))
    _checks.not_negative(x=torch.tensor([1, 2], dtype=torch.uint16))


def test_label_arrays_come_out_native_and_real() -> None:
    assert _checks.labels_array(np.array([1.0, 2.0], dtype=">f4")).dtype == np.dtype("=f4")
    assert _checks.labels_array(np.array([1.0], dtype=np.longdouble)).dtype == np.float64
    assert _checks.labels_array(torch.tensor([1.0], dtype=torch.bfloat16)).dtype == np.float32
    masked = np.ma.array([1, 2], mask=[False, True])
    with pytest.raises(ValueError, match=r"^\S+: y must not be masked"):
        _checks.labels_array(masked, "y")
    with pytest.raises(ValueError, match=r"^\S+: labels must form one array of numbers, got rows of different lengths"):
        _checks.labels_array([[1, 2], [3]])
    for value in ("a", np.array(["2020-01-01"], dtype="datetime64[D]"), [True], [1j], [10**30]):
        with pytest.raises(TypeError, match=r"^\S+: labels must be integers or floats, got dtype"):
            _checks.labels_array(value)
    for value in (None, {"a": 1}, torch.utils.data.DataLoader([1, 2])):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=rf"^\S+: labels must be integers or floats, got {type(value).__name__}\."):
            _checks.labels_array(value)


def test_instance_names_the_argument_and_its_class() -> None:
    _checks.instance(bool, a=True, b=False)
    with pytest.raises(TypeError, match=r"^\S+: b must be a bool, got str\."):
        _checks.instance(bool, a=True, b="no")
    with pytest.raises(TypeError, match=r"^\S+: x must be an int, got NoneType\."):
        _checks.instance(int, x=None)


def test_instance_names_every_kind_that_would_do() -> None:
    _checks.instance((bool, str), a=True, b="no")
    with pytest.raises(TypeError, match=r"^\S+: b must be a bool or a str, got int\.$"):
        _checks.instance((bool, str), a=True, b=1)
    with pytest.raises(TypeError, match=r"^\S+: x must be an LDS or an int or a Bins, got NoneType\.$"):
        _checks.instance((type("LDS", (), {}), int, type("Bins", (), {})), x=None)
    with pytest.raises(TypeError, match=r"^\S+: x must be a bool, got int\.$"):
        _checks.instance((bool,), x=1)


def test_keys_names_what_is_missing_and_what_is_unknown() -> None:
    with pytest.raises(TypeError, match=r"^\S+: x must be a dict, got NoneType\."):
        _checks.keys("x", None, ("a", "b"))
    with pytest.raises(ValueError, match=r"unknown \[1, 'c'\]"):
        _checks.keys("x", {"c": 1, 1: 2}, ())
    with pytest.raises(ValueError, match=r"got missing \['b'\], unknown \['c'\]"):
        _checks.keys("x", {"a": 1, "c": 2}, ("a", "b"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "must be at least 1, got 0"),
        (2**31, "must be at most 2,147,483,647, got 2147483648"),
        (10**1000, "must be at most 2,147,483,647, got a whole number of 3,322 bits"),
        (2.0, "must be a whole number, got 2.0"),
    ],
)
def test_length_refuses_what_no_axis_can_have(value: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^\S+: x {message}"):
        _checks.length("x", value)
    assert _checks.length("x", 2**31 - 1) == 2**31 - 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantized_tensors_are_no_plain_numbers() -> None:
    with pytest.raises(TypeError, match=r"^\S+: x must not be quantized, got dtype torch\.quint8\. Use x\.dequantize"):
        _checks.is_tensor(x=torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8))


def test_what_lies_on_several_devices_is_refused() -> None:
    class DTensor(torch.Tensor):
        def full_tensor(self) -> torch.Tensor: ...  # type: ignore[empty-body]

    spread = torch.ones(2).as_subclass(DTensor)
    message = r"^\S+: x must be a plain tensor, got a DTensor\. Use x\.to_local\(\), or x\.full_tensor\(\)\.$"
    for call in (lambda: _checks.on_one_device(x=spread), lambda: _checks.labels_array([spread], "x")):
        with pytest.raises(TypeError, match=message):
            call()
    _checks.on_one_device(x=torch.ones(2), y=torch.nn.Parameter(torch.ones(2)))
    assert not readable(spread)
