"""FDS: its settings, what it saves and takes back, and where it is made."""

import copy
import io
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dir_toolkit import FDS, Bins, gaussian
from dir_toolkit._state import pack, unpack
from dir_toolkit.errors import CheckpointError, DirToolkitError, DirToolkitWarning, UsageError
from dir_toolkit.features._inputs import require_float64

BINS = Bins.uniform(0, 9, width=1)
FORMS: list[Any] = ["diagonal", "full", "low_rank"]


def batch(seed: int = 0, n: int = 90) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % 9).double()
    return torch.randn(n, 4, generator=generator) + labels[:, None].float().sin(), labels


def made(form: Any = "diagonal", **settings: Any) -> FDS:
    return FDS(BINS, 4, covariance=form, rank=2, **settings)


def trained(fds: FDS, *seeds: int) -> FDS:
    for seed in seeds:
        fds.update(*batch(seed))
        fds.end_epoch()
    return fds


def bits(fds: FDS) -> dict[str, bytes]:
    state = {**fds.state_dict(), **dict(fds.named_buffers()), "carried": fds.calibrate(*batch(9))}
    return {name: value.numpy().tobytes() for name, value in state.items()}


# ---- hooks ----


def test_a_second_hook_on_one_module_is_refused_until_the_first_is_removed() -> None:
    layer, fds = nn.Linear(4, 4), made()
    handle = fds.attach(layer, "input")
    for where in ("input", "output"):
        with pytest.raises(
            UsageError, match=r"^FDS.attach: module must have no hook of this FDS yet.* Call remove\(\)"
        ):
            fds.attach(layer, where)  # type: ignore[arg-type]
    made().attach(layer, "input")  # another FDS may
    handle.remove()
    fds.attach(layer, "output")


def test_two_hooks_in_one_forward_count_and_carry_once_and_are_told_once() -> None:
    once, twice, body = made(), made(), nn.Linear(4, 4)
    heads = [nn.Linear(4, 1), nn.Linear(4, 1)]
    body.requires_grad_(False)
    once.attach(heads[0], "input")
    chained = nn.Sequential(body)
    twice.attach(chained, "output")
    twice.attach(heads[1], "input")
    heads[1].load_state_dict(heads[0].state_dict())
    x, y = batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            with once.labels(y):
                plain = heads[0](body(x))
            with twice.labels(y):
                again = heads[1](chained(x))
            torch.testing.assert_close(plain, again)
            once.end_epoch(), twice.end_epoch()
    assert torch.equal(once.running_count, twice.running_count)
    (message,) = [str(w.message) for w in caught if issubclass(w.category, DirToolkitWarning)]
    assert "two modules that this FDS is attached to ran within one labels()" in message


def test_a_module_run_twice_counts_both_views() -> None:
    layer, fds = nn.Linear(4, 1), made()
    fds.attach(layer, "input")
    x, y = batch()
    with fds.labels(y):
        layer(x), layer(x + 1)
    fds.end_epoch()
    assert fds.running_count.sum() == 180


def test_under_torch_func_it_refuses_in_words() -> None:
    layer, fds = nn.Linear(4, 1), trained(made(), 0)
    fds.attach(layer, "input")
    x, y = batch()
    with (
        fds.labels(y),
        pytest.raises(UsageError, match=r"^FDSInputHook: features must not be under a transform of torch\.func"),
    ):
        torch.func.grad(lambda z: layer(z).sum())(x)
    layer.eval()
    with fds.labels(y):
        torch.func.grad(lambda z: layer(z).sum())(x)
    assert int(fds._moments.count.sum()) == 0


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("where", ["input", "output"])
def test_scripting_a_hooked_module_is_refused_in_words(where: Any) -> None:
    net, fds = nn.Sequential(nn.Linear(4, 1)), FDS(BINS, 4)
    handle = fds.attach(net[0], where)
    (hook,) = (net[0]._forward_pre_hooks or net[0]._forward_hooks).values()
    assert hook.__name__ == {"input": "FDSInputHook", "output": "FDSOutputHook"}[where]
    with pytest.raises(UsageError, match=r"no hook of an FDS when torch\.jit\.script compiles it.* Call remove\(\)"):
        torch.jit.script(net)
    handle.remove()
    torch.jit.script(net)


def test_devices_without_float64_are_refused_in_words() -> None:
    with pytest.raises(UsageError, match=r"statistics must be on a device with float64.* got device 'mps'"):
        require_float64(torch.device("mps"))


def test_while_a_cuda_graph_is_captured_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    with pytest.raises(UsageError, match="must not be gathered while a CUDA graph is captured"):
        made().update(*batch())


# ---- windows ----


def test_over_classes_and_few_bins_nothing_is_smoothed_unless_a_window_is_given() -> None:
    for bins in (Bins.classes(9), Bins.uniform(0, 4, width=1)):
        for make in (FDS, FDS.reference):
            with pytest.warns(DirToolkitWarning, match=r"^FDS.*: nothing is smoothed over .* Pass a window as"):
                fds = make(bins, 4)
            assert fds.smoothing.tolist() == [1.0]
    with pytest.warns(DirToolkitWarning):
        fds = trained(FDS(Bins.classes(9), 4), 0)
    x, y = batch(9)
    torch.testing.assert_close(fds.calibrate(x, y.long()), x)
    explicit = trained(FDS(Bins.classes(9), 4, kernel=gaussian(5, 2)), 0)
    assert not torch.allclose(explicit.calibrate(x, y.long()), x)
    assert FDS(BINS, 4, kernel=None).smoothing.tolist() == [1.0]
    assert torch.equal(FDS(BINS, 4).smoothing, torch.from_numpy(gaussian(5, 2) / gaussian(5, 2).sum()))


def test_many_bins_take_little_memory_and_time() -> None:
    bins = Bins.uniform(0, 100_000, width=1)
    start = time.perf_counter()
    fds = FDS(bins, 8)
    fds.update(torch.randn(1000, 8), torch.arange(1000.0))
    fds.end_epoch()
    assert time.perf_counter() - start < 5  # a matrix would take 75 GiB
    assert sum(buffer.numel() * 8 for buffer in fds.buffers()) < 50e6


# ---- states ----


@pytest.mark.parametrize("form", FORMS)
def test_the_state_holds_tensors_alone_and_leaves_the_own_kernel_edges_and_clip(form: Any) -> None:
    fds = trained(made(form), 0, 1)
    state = fds.state_dict()
    assert all(type(value) is Tensor for value in state.values())
    assert not any("smooth" in name or "shift" in name for name in state)
    loaded, own = (made(form, kernel=gaussian(3, 1), edges="mirror", clip=(0.9, 1.1)) for _ in range(2))
    loaded.load_state_dict(state)
    trained(own, 0, 1)
    assert torch.equal(loaded.smoothing, own.smoothing)
    torch.testing.assert_close(loaded.calibrate(*batch(9)), own.calibrate(*batch(9)))
    assert not torch.equal(loaded.statistics()["smoothed_mean"], fds.statistics()["smoothed_mean"])


def test_the_state_of_a_diagonal_form_keeps_keys_and_shapes_throughout() -> None:
    fds = made()
    shapes = [{name: value.shape for name, value in fds.state_dict().items()}]
    for seed in range(12):
        fds.update(*batch(seed))
        shapes.append({name: value.shape for name, value in fds.state_dict().items()})
        fds.end_epoch()
        shapes.append({name: value.shape for name, value in fds.state_dict().items()})
    assert all(one == shapes[0] for one in shapes)


def refused(form: str, state: dict[str, Any]) -> list[dict[str, Any]]:
    """Broken variants of a state of this form."""
    count, mean, extra = state["running_count"], state["running_mean"], state["_extra_state"]
    damaged = extra.clone()
    damaged[20:40] = 0
    spread = next(name for name in state if name.startswith("covariance.running"))
    unpacked = unpack(extra)
    return [
        *(trained(made(other), 3, 4).state_dict() for other in FORMS if other != form),
        trained(FDS(Bins.uniform(0, 18, width=2), 4, covariance=form, rank=2), 3).state_dict(),  # type: ignore[arg-type]
        {name: value for name, value in state.items() if name != "running_mean"},
        {name: value for name, value in state.items() if name != "_extra_state"},
        {**state, "other": count},
        {**state, "running_count": -count - 1},
        {**state, "running_count": count * torch.nan},
        {**state, "running_mean": mean + torch.inf},
        {**state, "running_mean": mean[:, :3]},
        {**state, "running_mean": mean.long()},
        {**state, "running_mean": mean.to("meta")},
        {**state, "running_mean": [1.0]},
        {**state, spread: -torch.inf * state[spread]},
        {**state, "_extra_state": damaged},
        {**state, "_extra_state": extra[:-9]},
        {**state, "_extra_state": {"epoch": 1}},
        {**state, "_extra_state": pack(unpacked | {"counters": torch.tensor([1, -1, 0])})},
        {**state, "_extra_state": pack(unpacked | {"unplaced": torch.tensor(-1)})},
        {**state, "_extra_state": pack(unpacked | {"moments": {}})},
    ]


@pytest.mark.parametrize("form", FORMS)
def test_a_state_that_is_refused_changes_nothing(form: Any) -> None:
    fds, other = trained(made(form), 0, 7), trained(made(form), 5, 6)
    fds.update(*batch(1))
    before = bits(fds)
    for state in refused(form, other.state_dict()):
        with pytest.raises(DirToolkitError, match=r"^FDS\.load_state_dict: "):
            fds.load_state_dict(state)
        assert bits(fds) == before
    if form == "diagonal":
        negative = {"covariance.running_variance": -1 - other.covariance.running_variance}
        with pytest.raises(CheckpointError, match="running_variance must not be negative"):
            fds.load_state_dict(other.state_dict() | negative)
        assert bits(fds) == before
    fds.load_state_dict(other.state_dict())
    assert bits(fds) == bits(other)


def test_an_epoch_can_be_dropped() -> None:
    fds, plain = trained(made(), 0), trained(made(), 0, 2)
    assert not fds.has_open_epoch
    fds.update(*batch(1))
    assert fds.has_open_epoch
    fds.drop_epoch()
    assert not fds.has_open_epoch
    assert bits(trained(fds, 2)) == bits(plain)


def test_mid_epoch_evaluations_are_no_forgotten_ends_where_that_is_said() -> None:
    layer, fds = nn.Linear(4, 1), made()
    fds.attach(layer, "input")
    fds.warns_of_forgotten_end = False
    x, y = batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            with fds.labels(y):
                layer.train()(x)
                layer.eval()(x)
    assert [str(warning.message) for warning in caught] == []


def test_not_strict_a_state_without_any_of_it_is_passed_over_and_a_part_refused() -> None:
    fds = trained(made(), 0)
    net = nn.ModuleDict({"fds": fds, "head": nn.Linear(4, 1)})
    before = bits(fds)
    keys = net.load_state_dict(nn.ModuleDict({"head": nn.Linear(4, 1)}).state_dict(), strict=False)
    assert "fds.running_mean" in keys.missing_keys
    with pytest.raises(CheckpointError, match="must have the keys"):
        fds.load_state_dict({"running_mean": fds.running_mean}, strict=False)
    assert bits(fds) == before


# ---- where it is made ----


@pytest.mark.parametrize("form", FORMS)
def test_made_loaded_moved_or_first_used_in_inference_mode_it_trains_afterwards(form: Any) -> None:
    plain = trained(made(form), 0, 1)
    with torch.inference_mode():
        fds = made(form)
        fds.load_state_dict(plain.state_dict())
        fds.to("cpu").double()
        fds.calibrate(*batch(3))
        fds.update(*batch(2))
    fds.update(*batch(3))
    fds.end_epoch()
    for seed in (2, 3):
        plain.update(*batch(seed))
    plain.end_epoch()
    assert not any(buffer.is_inference() for buffer in fds.buffers())
    x, y = batch(9)
    for labels in (y, y.long()):
        fds.calibrate(x.requires_grad_(), labels).sum().backward()
    for name, value in plain.statistics().items():
        torch.testing.assert_close(fds.statistics()[name], value, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
def test_made_on_meta_it_is_as_new_once_it_is_somewhere(form: Any) -> None:
    with torch.device("meta"):
        fds = made(form)
    assert {buffer.device.type for buffer in fds.buffers()} == {"meta"}
    fds.state_dict()
    trained(fds.to_empty(device="cpu"), 0, 1)
    assert bits(fds) == bits(trained(made(form), 0, 1))
    state = copy.deepcopy(fds.state_dict())
    fds.to("meta").to_empty(device="cpu")
    assert fds.epoch == 0
    assert fds.running_count.sum() == 0
    for assign in (True, False):
        again = trained(made(form), 3).to("meta")
        again.load_state_dict(state, assign=assign)
        assert bits(again) == bits(trained(made(form), 0, 1))
        trained(again, 2)


def test_a_model_in_bfloat16_keeps_float64_statistics_also_when_it_loads() -> None:
    net = nn.ModuleDict({"fds": trained(made(), 0)}).to(torch.bfloat16)
    state = {name: value.bfloat16() if value.is_floating_point() else value for name, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    assert {buffer.dtype for buffer in net.buffers()} == {torch.float64}


def test_maps_without_pixels_pass() -> None:
    for form in FORMS:
        fds = trained(made(form), 0, 1)
        assert fds.calibrate(torch.zeros(2, 4, 0, 0), torch.zeros(2)).shape == (2, 4, 0, 0)


# ---- groups of ranks ----


def rank_main(rank: int) -> dict[str, Any]:
    """Both ranks hold the same samples, as under tensor parallelism: each is a data-parallel group of its own."""
    groups = [dist.new_group([0]), dist.new_group([1])]
    out = {}
    for form in FORMS:
        fds = made(form, group=groups[rank])
        twin = copy.deepcopy(fds)
        out[form] = trained(twin, 0, 1).statistics()
        try:
            torch.save(fds, io.BytesIO())
        except TypeError as error:
            out["told"] = str(error)
    out["all"] = trained(made(), 0).statistics()
    fds, again = trained(made(), 0), made()
    fds.update(*batch(1))
    again.load_merged_state(fds.merged_state())
    assert again.has_open_epoch
    for one in (fds, again):
        one.end_epoch()
    out["never saved"], out["merged"] = fds.statistics(), again.statistics()
    return out


def test_ranks_of_other_groups_are_not_counted(two_ranks: Callable[..., list[Any]]) -> None:
    for state in two_ranks(rank_main):
        for form in FORMS:
            expected = trained(made(form), 0, 1).statistics()
            for name in ("count", "mean", "variance"):
                torch.testing.assert_close(state[form][name], expected[name])
        assert state["all"]["count"].sum() == 180
        assert "Save its state_dict()" in state["told"]
        for name, value in state["never saved"].items():
            torch.testing.assert_close(state["merged"][name], value, rtol=1e-12, atol=1e-12, equal_nan=True)
