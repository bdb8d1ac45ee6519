"""FSDP2: two ranks with sharded parameters equal one process, in training, statistics, calibration and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import AGES, ages, batch, classes
from torch import Tensor

import dir_toolkit as dt
from dir_toolkit.errors import UsageError
from dir_toolkit.longtail.readouts import ScoreReadout

fully_shard = getattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard", None)
pytestmark = pytest.mark.skipif(fully_shard is None, reason="torch 2.6 is the first with FSDP2 in public")

MODELS: dict[str, Callable[[], dt.LongTailModel]] = {
    "bins": lambda: ages(fds=dt.FDS(AGES, 6), residual=True, target_prior="uniform"),
    "weighted": lambda: ages(fds=dt.FDS(AGES, 6, covariance="full"), weights=dt.LDS(AGES).fit(batch(40)[1])),
    "number": lambda: ages(fds=dt.FDS(AGES, 6), head="regression"),
    "gaussian": lambda: ages(head="gaussian"),
    "affinities": lambda: classes(fds=dt.FDS(dt.Bins.classes(4), 6, kernel=[1.0]), head="affinity"),
}


def data(model: dt.LongTailModel) -> tuple[Tensor, Tensor]:
    """Inputs, and labels that follow from them."""
    x, _ = batch(40)
    y = 19.9 * (2 * x[:, 0]).sigmoid()
    return x, (y / 5).long() if model.bins.categorical else y


def sharded(model: Any) -> Any:
    assert fully_shard is not None
    fully_shard(model.backbone)
    return fully_shard(model)


def trained(model: dt.LongTailModel, share: slice) -> dict[str, Tensor]:
    """Losses, statistics and predictions of six steps on a share of the batch, each an epoch by itself."""
    x, y = data(model)
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.3), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(x[share], y[share]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if model.fds is not None:
            model.fds.end_epoch()
    statistics = {} if model.fds is None else model.fds.statistics()
    model.eval()
    with torch.no_grad():
        return {**statistics, "losses": torch.stack(losses), "prediction": model(x).prediction}


def calibrated(model: dt.LongTailModel) -> dict[str, Tensor]:
    """What calibration finds, and predictions after it."""
    (x, y), found = data(model), {}
    if isinstance(model.readout, ScoreReadout):
        found["tau"] = torch.tensor(model.calibrate([(x, y)]).tau)
        model.calibrate([(x, y)], most_mae=None, bias=False)
    with torch.no_grad():
        model.calibrate_intervals(model(x).scores, y, 0.8, per_region=0.0)
        return {**found, "calibrated": model(x).prediction, **dict(model.readout.named_buffers())}


def rank_main(rank: int) -> dict[str, Any]:
    share, out = slice(20 * rank, 20 * rank + 20), {}
    for name, make in MODELS.items():
        model = sharded(make())
        assert any(hasattr(p, "full_tensor") for p in model.parameters())
        out[name] = {**trained(model, share), **calibrated(model)}
        model.save(f"{name}.safetensors")
        assert Path(f"{name}.safetensors").exists()
        out[name] |= restored(model, make)
    out["refused"] = refused()
    return out


def restored(model: dt.LongTailModel, make: Callable[[], dt.LongTailModel]) -> dict[str, Tensor]:
    """What models predict whose state came from this one: a plain one from the whole, a sharded one from shards."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    x, _ = data(model)
    plain, again = make().eval(), sharded(make()).eval()
    plain.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    folder = f"checkpoint of {model.settings['head']}, {0 if model.fds is None else model.fds.settings['covariance']}"
    checkpoint.save(get_model_state_dict(model), checkpoint_id=folder)
    state = get_model_state_dict(again)
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(again, state)
    if again.fds is not None:
        for key, value in again.fds.statistics().items():
            torch.testing.assert_close(value, model.fds.statistics()[key], rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        return {"plain": plain(x).prediction, "again": again(x).prediction}


def refused() -> list[str]:
    """What is said where parameters are not gathered."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    model, features = sharded(MODELS["bins"]()), torch.randn(4, 6)
    apart = MODELS["affinities"]()
    for part in (apart.head, apart):
        fully_shard(part)
    said = []
    for call in (lambda: model.read(features), lambda: apart(*data(apart))):
        try:
            call()
        except UsageError as error:
            said.append(str(error))
    register_fsdp_forward_method(model, "read")
    model.read(features)
    return said


def test_two_ranks_with_sharded_parameters_equal_one_process(
    two_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    states = two_ranks(rank_main, timeout=200)
    for name, make in MODELS.items():
        model = make()
        expected = trained(model, slice(None)) | calibrated(model)
        losses = torch.stack([state[name].pop("losses") for state in states]).mean(0)
        torch.testing.assert_close(losses, expected.pop("losses"), rtol=1e-5, atol=1e-6)
        loaded = dt.load(tmp_path / f"{name}.safetensors", MODELS[name]().backbone)
        for state in states:
            for key, value in expected.items():
                torch.testing.assert_close(state[name][key], value, rtol=1e-4, atol=1e-4, equal_nan=True, msg=key)
            own = state[name]["calibrated"]
            for prediction in (state[name]["plain"], state[name]["again"], loaded(data(model)[0]).prediction.detach()):
                torch.testing.assert_close(prediction, own, rtol=1e-6, atol=1e-6)
    for state in states:
        read, diversity = state["refused"]
        fix = r"Call fully_shard on the backbone and on the model, not on its head, and register_fsdp_forward_method"
        assert read.startswith("LongTailModel.read: parameters must be gathered, also weight, got a DTensor. " + fix)
        assert diversity.startswith("LongTailModel: parameters must be gathered, also weight, got a DTensor. " + fix)
