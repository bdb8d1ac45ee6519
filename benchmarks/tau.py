"""How far the tau that a model chooses on held-out rows is from the best: its regret in bMAE on test rows.

    OMP_NUM_THREADS=1 python benchmarks/tau.py --root DIR  # 7 tables, 8 splits

DIR holds the tables as CSV packed with gzip, the label in the first column. Per split, a perceptron with soft labels
over 50 even bins trains on 60 % of the rows, at most 4,000. A quarter as many end the training and choose tau, and the
others, at most 4,000, are the test. The regret of a tau is its bMAE on the test rows divided by that of the best tau
there at the same temperature, minus one. The best tau has seen the test labels, so other taus show what can be reached:
1; the best one for all tests together; and that of a random half of the test rows, judged on the other half.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import dir_toolkit as dt

TABLES = ("diabetes", "abalone", "airfoil", "concrete", "house16H", "appliances_energy", "rain_ibk")
UNUSED = ["rownames", "rv1", "rv2"]
TAUS = np.linspace(0, 3, 61)
MOST = 4000


def read(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    if name == "diabetes":  # comes with scikit-learn
        return load_diabetes(return_X_y=True)
    table = pd.read_csv(root / f"{name}.csv.gz", encoding="utf-8-sig").drop(columns=UNUSED, errors="ignore")
    label = table.pop(table.columns[0]).to_numpy(float)
    # 52 prices are 0, and all others at least 14,999: they would stretch the axis.
    return pd.get_dummies(table).to_numpy(float), np.log(label.clip(14_999)) if name == "house16H" else label


def trained(x: Tensor, y: Tensor, train: int, seed: int) -> tuple[dt.LongTailModel, Tensor]:
    """A model that trained on the first rows until the next rows ended it, and its scores of all but the first."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 64), nn.ReLU())
    bins = dt.Bins.uniform(float(y[:train].min()), float(y[:train].max()), count=50)
    model = dt.LongTailModel.for_labels(net, 64, y[:train], bins=bins)
    soft = dt.soft_labels(y, bins, sigma=2 * float(bins.edges[1] - bins.edges[0]), ends="open").float()

    def loss(rows: Tensor) -> Tensor:  # that of the model, without a check of the labels in each step
        return nn.functional.cross_entropy(model.head(net(x[rows])), soft[rows])

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    least, best, kept = np.inf, model.state_dict(), 0
    for epoch in range(50):
        model.train()
        for rows in torch.randperm(train).split(128):
            optimizer.zero_grad(), loss(rows).backward(), optimizer.step()
        model.eval()
        now = loss(torch.arange(train, train + train // 4)).item()
        if now < least:
            least, best, kept = now, copy.deepcopy(model.state_dict()), epoch
        if epoch == kept + 6:
            break
    model.load_state_dict(best)
    return model, model.head(net(x[train:])).detach()


def regrets(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[dict[str, float], np.ndarray]:
    """The regrets by name, and that of each tau at temperature 1."""
    train = min(MOST, round(0.6 * len(y)))
    rows, held = np.random.default_rng(seed).permutation(len(y))[: train + train // 4 + MOST], train // 4
    x, labels = x[rows], torch.from_numpy(y[rows].clip(y[rows[:train]].min(), y[rows[:train]].max()))
    deviation = x[:train].std(0)
    x = ((x - x[:train].mean(0)) / np.where(deviation > 0, deviation, 1)).clip(-10, 10)
    model, scores = trained(torch.from_numpy(x).float(), labels, train, seed)
    scores, test, labels, target = scores[:held], scores[held:], labels[train : train + held], labels[train + held :]
    row = model.bins.index(target).numpy()

    def errors(temperature: float) -> np.ndarray:
        predictions = []
        for tau in TAUS.tolist():
            model.set_prior("uniform", tau, temperature=temperature)
            predictions.append(model.readout(test, test, test).prediction)
        return (torch.stack(predictions, 1) - target[:, None]).abs().numpy()

    def bmae(errors: np.ndarray, part: slice | np.ndarray = slice(None)) -> np.ndarray:
        return pd.DataFrame(errors[part]).groupby(row[part]).mean().mean().to_numpy()

    def regret(curve: np.ndarray, tau: float) -> float:
        return float(curve[np.abs(TAUS - tau).argmin()] / curve.min() - 1)

    chosen = model.choose_tau(scores, labels).tau
    choice = model.calibrate(scores, labels, most_mae=None, bias=False)
    plain, half = errors(1.0), np.random.default_rng(seed).permutation(len(row)) % 2 == 0
    of_all, one, two = bmae(plain), bmae(plain, half), bmae(plain, ~half)
    found = {"choose_tau": regret(of_all, chosen), "calibrate": regret(bmae(errors(choice.temperature)), choice.tau)}
    found["half of test"] = (regret(one, TAUS[two.argmin()]) + regret(two, TAUS[one.argmin()])) / 2
    return {**found, "tau 1": regret(of_all, 1.0)}, of_all / of_all.min() - 1


def main(root: Path, splits: range) -> None:
    found = {(name, split): regrets(*read(root, name), split) for name in TABLES for split in splits}
    table = pd.DataFrame({key: row for key, (row, _) in found.items()}).T.rename_axis(["table", "split"])
    curves = np.stack([curve for _, curve in found.values()])
    fixed = int(np.log1p(curves).mean(0).argmin())
    table[f"best fixed, {TAUS[fixed]:.2g}"] = curves[:, fixed]
    each, logs = table.groupby("table", sort=False), np.log1p(table).groupby("split").mean()
    rows = pd.concat([each.mean(), np.expm1(logs.mean()).to_frame("geometric mean").T])
    spread = pd.concat([each.std(), logs.sem().to_frame("geometric mean").T])
    shown = (100 * rows).map("{:.1f} ± ".format) + (100 * spread).map("{:.1f}".format)
    print(f"regret in %, mean ± standard deviation over splits; last row: ± standard error\n{shown.to_string()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the folder of the tables")
    parser.add_argument("--splits", type=int, nargs="+", default=[8], help="how many, or the first and the end")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", dt.DirToolkitWarning)
    main(arguments.root, range(*arguments.splits))
