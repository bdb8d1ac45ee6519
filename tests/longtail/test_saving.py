from __future__ import annotations

import copy
import errno
import inspect
import io
import json
import pickle
import sys
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dir_toolkit as dt
from dir_toolkit._settings import described
from dir_toolkit._state import pack, unpack
from dir_toolkit.errors import ArgumentError, CheckpointError, MissingPackageError
from dir_toolkit.longtail import LongTailModel, LongTailOutput
from dir_toolkit.longtail.model import HeadName
from dir_toolkit.longtail.readouts import ScoreReadout
from dir_toolkit.longtail.saving import _FORMAT, _digest, _made_with

safetensors = pytest.importorskip("safetensors.torch")

AGES = dt.Bins.uniform(0, 20, width=1)
AGE_DENSITY = dt.LabelDensity(AGES, np.arange(1, 21)[::-1] ** 2)
CLASSES = dt.Bins.classes(4)
UNEVEN = dt.Bins.from_edges([0.0, 0.1, 1 / 3, 2.0, 7.0, 21.0])
X = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))


def net(width: int = 5, features: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, features))


def trained(bins: dt.Bins = AGES, density: Any = AGE_DENSITY, **options: Any) -> LongTailModel:
    """A model whose numbers are not those that it was made with."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LongTailModel(net(), 6, bins, density=density, **options)
        model.backbone(X)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value))
    return model.eval()


def same_output(a: LongTailOutput, b: LongTailOutput) -> None:
    for name, one, other in zip(a._fields, a, b, strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one.nan_to_num(-7.0), other.nan_to_num(-7.0)), name


def even_classes() -> dt.LabelDensity:
    return dt.LabelDensity(CLASSES, np.array([80, 10, 5, 2]))


MODELS: dict[str, Any] = {
    **{head: lambda head=head: trained(head=head) for head in get_args(HeadName)},
    "balanced_mse": lambda: trained(head="regression", loss="balanced_mse", within_axis=True, prior_kernel=[1, 2, 1]),
    "balanced_mse, weights": lambda: trained(
        head="regression", loss="balanced_mse", weights=dt.LDS(AGES, scheme="inverse").fit(AGE_DENSITY)
    ),
    "residual": lambda: trained(
        residual=True, expectation_weight=0.1, decode="mode", label_kernel="laplace", sigma=1.0
    ),
    "in_loss": lambda: trained(target_prior="uniform", tau=0.8, adjust="in_loss", loss="crps"),
    "target": lambda: trained(target_prior=AGE_DENSITY.prior()[::-1].copy(), tau=0.7, temperature=1.3, outside="clip"),
    "weights": lambda: trained(weights=dt.LDS(AGES, scheme="inverse", clip=(1, 50)).fit(AGE_DENSITY), outside="drop"),
    "reference": lambda: trained(weights=dt.LDS.reference(AGES, scheme="inverse").fit(AGE_DENSITY)),
    "fds": lambda: trained(fds=dt.FDS(AGES, 6)),
    "uneven": lambda: trained(UNEVEN, dt.LabelDensity(UNEVEN, np.array([9, 3, 4, 2, 1]))),
    "missing": lambda: trained(weights=dt.LDS(AGES, missing="drop").fit(AGE_DENSITY), missing="drop"),
    "no density": lambda: trained(density=None),
    "auto": lambda: trained(bins := dt.Bins.auto(y := np.arange(300) ** 1.1), dt.LabelDensity.count(y, bins)),
    "classes": lambda: trained(CLASSES, even_classes(), target_prior="uniform"),
    "affinity classes": lambda: trained(CLASSES, even_classes(), head="affinity"),
    "double": lambda: trained().double(),
    "bfloat16": lambda: trained(weights=dt.LDS(AGES).fit(AGE_DENSITY)).bfloat16(),
}


@pytest.mark.filterwarnings("ignore:.*spreads each label")
@pytest.mark.parametrize("name", MODELS)
def test_what_was_loaded_predicts_the_same_bits(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save(tmp_path / "model.safetensors")
    loaded = dt.load(tmp_path / "model.safetensors", net())
    x = X.to(next(model.parameters()).dtype)
    same_output(loaded(x), model(x))
    assert not loaded.training
    assert described("model", {**loaded.settings, "fds": None}) == described("model", {**model.settings, "fds": None})
    assert (loaded.bins, loaded.bins.why, loaded.density) == (model.bins, model.bins.why, model.density)
    if isinstance(model.readout, ScoreReadout) and model.density is not None:
        for one in (model, loaded):
            one.set_prior("uniform", 0.4)
        same_output(loaded(x), model(x))
    y = torch.tensor([0, 1, 3, 2, 2, 1, 3, 0, 1]) if model.bins.categorical else torch.linspace(0, 19, 9)
    if name != "fds":
        assert torch.equal(loaded.train()(x, y).loss, model.train()(x, y).loss)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_window_in_label_units_is_saved_as_that_of_the_axis(tmp_path: Path) -> None:
    model = trained(target_prior="uniform", prior_kernel=dt.gaussian(5.0, 2.0, unit="label"))
    model.save(tmp_path / "model.safetensors")
    loaded = dt.load(tmp_path / "model.safetensors", net())
    for one in (model, loaded):
        one.set_prior("uniform", 0.4)
    same_output(loaded(X), model(X))


def test_states_saved_before_there_was_a_bias_are_loaded_without_one(tmp_path: Path) -> None:
    old, path = trained(target_prior="uniform"), tmp_path / "model.safetensors"
    expected = old(X)
    del old.readout.bias
    old.save(path)
    same_output(dt.load(path, net())(X), expected)
    model = trained()
    model.readout.bias.fill_(1)
    model.load_state_dict(old.state_dict())
    assert not model.readout.bias.any()
    same_output(model(X), expected)


def test_calibration_is_saved_and_random_numbers_are_left_alone(tmp_path: Path) -> None:
    model, path = trained(), tmp_path / "model.safetensors"
    model.choose_tau(model(X).scores, torch.linspace(0, 19, 9), taus=[0.0])
    model.set_prior("uniform", 0.3, temperature=1.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few samples
        model.calibrate_intervals(model(X).scores, torch.linspace(0, 19, 9), 0.8)
    model.save(path)
    torch.manual_seed(3)
    loaded = dt.load(path, (backbone := net()).train())
    state = torch.random.get_rng_state()
    torch.manual_seed(3)
    net()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert loaded.backbone is backbone
    for one, other in zip(loaded.interval(loaded(X)), model.interval(model(X)), strict=True):
        assert torch.equal(one, other)


class Own(nn.Module):
    """A head that was made elsewhere."""

    def __init__(self, size: int = 20) -> None:
        super().__init__()
        self.layer = nn.Linear(6, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def own_loss(scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    return scores.mean()


def test_a_head_and_a_loss_of_ones_own_are_handed_over(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = trained(head=Own(), loss=own_loss)
    model.save(path)
    loaded = dt.load(path, net(), head=Own(), loss=own_loss)
    same_output(loaded(X), model(X))
    for given, message in (
        ({"loss": own_loss}, r"head must be given, as in the model saved in .*model\.safetensors', got None"),
        ({"head": Own()}, r"loss must be given, as in the model saved in .*model\.safetensors', got None"),
        (
            {"head": Own(3), "loss": own_loss},
            r"head must be of the architecture that was saved in .*, got head\.layer\.weight of",
        ),
    ):
        with pytest.raises(ValueError, match=f"^load: {message}"):
            dt.load(path, net(), **given)
    trained().save(path)
    with pytest.raises(ArgumentError, match=r"^load: head must be left out, got one beside the saved 'linear' in '.*'"):
        dt.load(path, net(), head=Own())


class Twice(nn.Linear):
    """A head with the parameters of a linear one, and other scores."""

    def forward(self, features: Tensor) -> Tensor:
        return 2 * super().forward(features)


@pytest.mark.parametrize(
    ("options", "replaced"),
    [
        ({"bins": CLASSES, "density": even_classes()}, lambda head: dt.heads.ScaledHead(head)),
        ({}, lambda head: dt.heads.tau_normalized(head, 0.7)),
        ({"head": "affinity"}, lambda head: Twice(6, 20)),
        ({"head": "regression", "loss": "balanced_mse"}, lambda head: Twice(6, 1)),
        ({"residual": True, "target_prior": "uniform", "adjust": "in_loss"}, lambda head: Twice(6, 20)),
    ],
)
def test_a_head_that_took_the_place_of_a_named_one_is_handed_over(
    options: dict[str, Any], replaced: Any, tmp_path: Path
) -> None:
    path, model = tmp_path / "model.safetensors", trained(**options)
    model.head = replaced(model.head).eval()
    assert model.settings["head"] is model.head
    assert copy.deepcopy(trained(**options)).settings["head"] == (options.get("head") or "linear")
    model.save(path)
    hint = (
        r"\. After stage_two\(model, 'lws'\) it is ScaledHead"
        if isinstance(model.head, dt.heads.ScaledHead)
        else r"\.$"
    )
    with pytest.raises(ValueError, match=r"^load: head must be given, as in the model saved in .*, got None" + hint):
        dt.load(path, net())
    blank = copy.deepcopy(model.head)
    for value in (*blank.parameters(), *blank.buffers()):
        value.data.zero_()
    loaded = dt.load(path, net(), head=blank)
    same_output(loaded(X), model(X))
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    same_output(dt.load(again, net(), head=copy.deepcopy(blank))(X), model(X))


def test_copies_of_a_named_head_are_named_and_take_no_other_with_them(tmp_path: Path) -> None:
    model, path = trained(), tmp_path / "model.safetensors"
    expected, size = model(X), len(pickle.dumps(model))
    model.head = copy.deepcopy(model.head)  # such as that of the best epoch
    copy.deepcopy(model).save(path)
    same_output(dt.load(path, net())(X), expected)
    model.head = pickle.loads(pickle.dumps(Twice(6, 20)))
    assert len(pickle.dumps(model)) < size + 500
    model = trained()
    nn.utils.parametrizations.weight_norm(model.head)
    model.save(path)
    blank = nn.utils.parametrizations.weight_norm(dt.heads.LinearHead(6, 20))
    same_output(dt.load(path, net(), head=blank)(X), model(X))


def test_targets_with_a_replaced_head_are_saved_one_by_one(tmp_path: Path) -> None:
    several = dt.MultiTargetModel.for_labels(net(), 6, torch.rand(40, 2))
    dt.stage_two(several.targets[0], "lws")
    with pytest.raises(ValueError, match="heads and losses must be named ones to be saved together, got one's own"):
        several.save(tmp_path / "model.safetensors")


def test_numbers_of_any_kind_are_kept_and_saved_as_floats(tmp_path: Path) -> None:
    prior, path = AGE_DENSITY.prior().copy(), tmp_path / "model.safetensors"
    model = trained(sigma=Fraction(3, 2), target_prior=prior, tau=Fraction(1, 2))
    expected = model(X)
    prior[:] = 1 / 20  # settings are those of the model, whatever becomes of the array
    np.testing.assert_array_equal(model.settings["target_prior"], AGE_DENSITY.prior())
    model.save(path)
    loaded = dt.load(path, net())
    same_output(loaded(X), expected)
    assert (loaded.settings["sigma"], loaded.settings["tau"]) == (1.5, 0.5)


def test_another_backbone_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    trained().save(path := tmp_path / "model.safetensors")
    rule = r"^load: backbone must be of the architecture that was saved in .*, got "
    for other, got in (
        (net(width=4), r"backbone\.0\.weight of shape \(4, 3\), saved as \(5, 3\), .* and 4 more\. Make it as it was"),
        (net()[:3], r"no backbone\.3\.bias, no backbone\.3\.weight\."),
        (nn.Sequential(*net(), nn.Linear(6, 6)), r"backbone\.4\.weight besides, backbone\.4\.bias besides\."),
        (net(features=7), r"backbone\.3\.weight of shape \(7, 5\)"),
    ):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(CheckpointError, match=rule + got):
            dt.load(path, other)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(TypeError, match=r"^load: backbone must be a Module, got str"):
        dt.load(path, "resnet")


def test_a_file_that_is_damaged_foreign_or_missing_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    trained().save(path)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for i in range(60):
        place = int(generator.integers(len(whole))) if i else len(whole) - 1
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged if i % 3 else whole[:place])
        backbone = net()
        before = copy.deepcopy(backbone.state_dict())
        with pytest.raises(CheckpointError, match=r"^load: path must be a (whole|file).*model\.safetensors'"):
            dt.load(path, backbone)
        assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    path.write_bytes(safetensors.save({"a": torch.ones(2)}))
    with pytest.raises(
        CheckpointError, match=r"must be a file of the format 'dir_toolkit\.LongTailModel 1', got '' in .* Only"
    ):
        dt.load(path, net())
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    header["__metadata__"]["format"] = "dir_toolkit.LongTailModel 2"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
    with pytest.raises(CheckpointError, match=r"got 'dir_toolkit\.LongTailModel 2' in '.*'\. Load it with the rel"):
        dt.load(path, net())
    with pytest.raises(FileNotFoundError, match=r"^load: path must be a saved model, got no file '.*none'"):
        dt.load(tmp_path / "none", net())
    with pytest.raises(CheckpointError, match="must be a whole safetensors file"):
        dt.load(tmp_path, net())


def forged(path: Path, change: Any) -> None:
    """The file with other tensors, and the checksum that belongs to them."""
    tensors = safetensors.load(path.read_bytes())
    change(tensors)
    path.write_bytes(safetensors.save(tensors, {"format": _FORMAT, "sha256": _digest(tensors)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("made_with"), "must be the bytes from state_dict"),
        (lambda t: t.update(made_with=pack({"head": None})), "KeyError: 'loss'"),
        (lambda t: t.update(made_with=pack({"targets": 3})), "TypeError"),
        (lambda t: t.update(made_with=pack({**unpack(t["made_with"]), "head": torch.ones(2)})), "ambiguous"),
        (lambda t: t.pop("head.weight"), r"Missing key.*head\.weight"),
        (lambda t: t.update({"head.weight": torch.ones(2, 2)}), r"size mismatch for head\.weight"),
        (lambda t: t.update({"head.weight": t["head.weight"].int()}), "floating point"),
    ],
)
def test_a_file_whose_parts_do_not_fit_is_named_and_the_backbone_stays(
    tmp_path: Path, change: Any, message: str
) -> None:
    path = tmp_path / "model.safetensors"
    trained().double().save(path)
    forged(path, change)
    backbone = net()
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(
        CheckpointError, match=rf"(?s)^load: path must hold a model whose parts fit.*model\.saf.*{message}"
    ):
        dt.load(path, backbone)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(value.dtype == before[name].dtype for name, value in backbone.state_dict().items())


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that was made."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize(
    "options", [*({"head": head} for head in get_args(HeadName)), {"residual": True}, {"head": Own(), "loss": own_loss}]
)
def test_a_small_file_that_names_many_features_takes_no_memory(tmp_path: Path, options: dict[str, Any]) -> None:
    model, path = trained(**options), tmp_path / "model"
    model.save(path)
    own = {name: value for name, value in options.items() if not isinstance(value, (str, bool))}

    def change(tensors: dict[str, Tensor]) -> None:
        made_with = unpack(tensors["made_with"])
        made_with["options"] |= {"residual": True} if own else {}
        tensors["made_with"] = pack({**made_with, "num_features": 10**6})

    forged(path, change)
    assert path.stat().st_size < 12_000
    with Largest() as largest, pytest.raises(CheckpointError, match=r"got 1000000 features and .* numbers"):
        dt.load(path, net(), **own)
    assert largest.numel < 12_000


def test_a_small_file_of_several_targets_that_names_many_features_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "model"
    dt.MultiTargetModel.for_labels(net(), 6, torch.rand(40, 2)).save(path)

    def change(tensors: dict[str, Tensor]) -> None:
        first, second = unpack(tensors["made_with"])["targets"]
        tensors["made_with"] = pack({"targets": [first, {**second, "num_features": 10**6}]})

    forged(path, change)
    with Largest() as largest, pytest.raises(CheckpointError, match=r"got 1000000 features and .* numbers"):
        dt.load(path, net())
    assert largest.numel < 12_000


@pytest.mark.parametrize("key", ["backbone.0.weight", "backbone.0.bias", "backbone.1.running_mean"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64, torch.int32])
def test_a_layer_in_several_dtypes_is_refused_unless_that_of_the_backbone_is_too(
    tmp_path: Path, key: str, dtype: torch.dtype
) -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6))

    LongTailModel(normed(), 6, AGES).save(path := tmp_path / "model.safetensors")
    forged(path, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    backbone = normed()
    before = copy.deepcopy(backbone.state_dict())
    layer = key.rpartition(".")[0]
    with pytest.raises(CheckpointError, match=rf"^load: {layer} must have one dtype in '.*model.*', .* in {key}"):
        dt.load(path, backbone)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    if dtype.is_floating_point:
        own = backbone.get_parameter(key[9:]) if "running" not in key else backbone.get_buffer(key[9:])
        own.data = own.data.to(dtype)
        assert dt.load(path, backbone).state_dict()[key].dtype == dtype


def test_layers_may_differ_in_dtype_from_one_another(tmp_path: Path) -> None:
    model = LongTailModel(nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)), 6, AGES)
    model.backbone[0].half()  # type: ignore[index]
    model.save(tmp_path / "model")
    loaded = dt.load(tmp_path / "model", nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)))
    assert [value.dtype for value in loaded.backbone.parameters()] == [torch.float16] * 2 + [torch.float32] * 2


def test_a_backbone_with_other_state_or_without_values_is_refused(tmp_path: Path) -> None:
    trained().save(path := tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"^load: backbone must be of the arch.*_extra_state besides"):
        dt.load(path, nn.Sequential(*net(), Stateful()))  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"^load: backbone must have values to replace, also backbone\.0\.weight"):
        dt.load(path, nn.Sequential(nn.LazyLinear(6)))
    with pytest.raises(ValueError, match=r"^load: backbone must have values to replace, also backbone\.0\.weight"):
        dt.load(path, net().to("meta"))


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class Stateful(nn.Identity):
    def get_extra_state(self) -> Any:
        return {"a": 1}


def test_what_cannot_be_written_spares_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    trained().save(path)
    whole = path.read_bytes()
    model = trained()
    model.backbone.get_extra_state = lambda: {"a": 1}  # type: ignore[method-assign]
    broken = type(
        "Broken", (nn.Module,), {"get_extra_state": lambda self: {"a": 1}, "set_extra_state": lambda *_: None}
    )
    model = LongTailModel(nn.Sequential(net(), broken()), 6, AGES)
    with pytest.raises(
        TypeError, match=r"^LongTailModel\.save: the model must keep its state in tensors alone, also backb"
    ):
        model.save(path)
    with pytest.raises(FileNotFoundError, match=r"^LongTailModel\.save: path must lie in an existing folder"):
        trained().save(tmp_path / "none" / "model")
    with monkeypatch.context() as disk:
        disk.setattr("os.fsync", full_disk)
        rule = rf"^LongTailModel\.save: '{path}' must be writable to its end, got OSError: .* Free the disk, or"
        with pytest.raises(OSError, match=rule):
            trained().save(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingPackageError, match=r"^LongTailModel\.save: safetensors must be installed, .*pip inst"):
        trained().save(path)
    with pytest.raises(MissingPackageError, match=r"^load: safetensors must be installed"):
        dt.load(path, net())
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_numbers_that_several_names_share_are_loaded_as_shared(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        backbone = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        backbone[1].weight = backbone[0].weight
        return backbone

    model = LongTailModel(tied(), 3, AGES).eval()
    model.save(tmp_path / "model")
    loaded = dt.load(tmp_path / "model", tied())
    assert loaded.backbone[0].weight is loaded.backbone[1].weight
    same_output(loaded(X), model(X))
    torch.save(loaded, io.BytesIO())  # and it is a module as any other


def test_every_argument_of_the_constructor_is_saved() -> None:
    """But the backbone, which is handed over, and FDS, which predictions do not need."""
    arguments = set(inspect.signature(LongTailModel).parameters) - {"backbone", "fds"}
    assert arguments <= _made_with(trained()).keys()


def test_numbers_of_numpy_and_columns_of_pandas_are_saved(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    bins = dt.Bins.uniform(0, 50, width=1)
    density, shares = dt.LabelDensity(bins, np.arange(50, 0, -1)), np.arange(1, 51) / 1275
    for sigma in (np.float32(3), np.int64(3)):
        for prior, tau in (("uniform", np.float32(0.5)), (pandas.Series(shares), 1)):
            model = LongTailModel(nn.Linear(3, 4), 4, bins, density=density, sigma=sigma)
            model.set_prior(prior, tau)
            model.save(tmp_path / "model.safetensors")
            again = dt.load(tmp_path / "model.safetensors", nn.Linear(3, 4))
            x = torch.ones(2, 3)
            assert model.predict(x).prediction.equals(again.predict(x).prediction)
            assert again.settings["sigma"] == 3
