"""What the suite measured: tables, ranks with a critical-difference picture, and the page "Which method?".

    python benchmarks/suite/report.py

Reads ``<set>.csv``, ``<set>-differences.csv`` and ``<set>-failed.csv`` in this folder, which
``recipes/studies/suite.py`` writes, and writes ``tables.md`` beside them, and ``docs/which-method.md`` and
``docs/which-method.png``. The folders ``ensembles``, ``faces``, ``faces_untuned`` and ``uci_dir`` hold results of some
methods alone, which have sections of their own and enter no other mean and no rank.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import friedmanchisquare, studentized_range, t

from dir_toolkit.experiment.results.drawing import GREY, INK, literal, look, new_figure, save_figure

HERE, DOCS = Path(__file__).parent, Path(__file__).parents[2] / "docs"
NOT_TABLES = ("beijing", "cmapss", "emobank", "sts_b_dir")
OF_TABLES = ("boosting", "boosting_lds", "boosting_adjusted", "long_tail_regressor")  # cannot read all of these
APART = ("ensembles", "faces", "faces_untuned", "uci_dir")
EVEN = ("sts_b_dir",)  # its test labels are spread evenly
PUBLISHED = {  # MAE over all test labels in table 2 of Dong et al. 2025 (arXiv:2503.00876)
    "l1": {"airfoil_dir": 5.66, "abalone_dir": 4.57, "concrete_dir": 7.29},
    "lds+fds": {"airfoil_dir": 5.76, "abalone_dir": 5.09, "concrete_dir": 6.88},
    "balanced_mse": {"airfoil_dir": 5.69, "abalone_dir": 5.37, "concrete_dir": 7.03},
    "srl": {"airfoil_dir": 5.10, "abalone_dir": 4.16, "concrete_dir": 5.94},
}
LEVEL = 0.95
FEWEST = 3
"""Sets from which on a page says which method to take, and methods from which on ranks are compared."""


class Suite(NamedTuple):
    rows: pd.DataFrame
    """The errors of each run, with its set."""
    differences: pd.DataFrame
    """The comparisons with plain L1, with their set."""
    notes: dict[str, list[str]]
    """Command, versions, commit and digests of the sittings of each set."""
    failed: dict[str, set[str]]
    """The methods that failed on each set."""
    apart: dict[str, Suite]
    """The results in the folders within, by their names."""


def read(folder: Path) -> Suite:
    rows, differences, notes, failed = [], [], {}, {}
    apart = {name: read(folder / name) for name in APART if (folder / name).exists()}
    for path in sorted(folder.glob("*-differences.csv")):
        name = path.stem.removesuffix("-differences")
        text = (folder / f"{name}.csv").read_text(encoding="utf-8")
        notes[name] = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("#")]
        rows.append(pd.read_csv(folder / f"{name}.csv", comment="#").assign(set=name))
        differences.append(pd.read_csv(path).assign(set=name))
        faults = folder / f"{name}-failed.csv"
        failed[name] = set(pd.read_csv(faults)["method"]) if faults.exists() else set()
        budgets = rows[-1][["rows", "epochs", "trials"]].drop_duplicates()
        if len(budgets) > 1:
            sys.exit(f"{folder / name}.csv must have one budget, got several:\n{budgets.to_string(index=False)}")
    if not rows:
        sys.exit(f"{folder} must hold a <set>-differences.csv of recipes/studies/suite.py, got none.")
    return Suite(pd.concat(rows, ignore_index=True), pd.concat(differences, ignore_index=True), notes, failed, apart)


def markdown(table: pd.DataFrame) -> str:
    """A table whose index is its first column."""
    head = ["", *map(str, table.columns)]
    lines = [head, ["---", *["---:"] * len(table.columns)]]
    lines += [[str(name), *map(str, row)] for name, row in zip(table.index, table.to_numpy(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def means(suite: Suite, error: str) -> pd.DataFrame:
    """Methods by sets: mean ± standard deviation over seeds."""
    groups = suite.rows.groupby(["method", "set"], sort=False)[error]
    cells = groups.mean().map("{:.4g}".format) + groups.std().map(lambda sd: "" if np.isnan(sd) else f" ± {sd:.2g}")
    return cells.where(groups.mean().notna(), "").unstack("set").fillna("")


def ratios(suite: Suite, error: str, region: str = "all") -> pd.DataFrame:
    """Methods by sets: the ratio to plain L1 and its interval, in bold where it excludes 1."""
    part = suite.differences.query("metric == @error and region == @region and method not in ['l1', 'constant']")
    cells = [
        "" if np.isnan(row.ratio) else _bold(f"{row.ratio:.2f}", row) + f" [{row.ratio_low:.2f}, {row.ratio_high:.2f}]"
        for row in part.itertuples()
    ]
    return part.assign(cell=cells).pivot(index="method", columns="set", values="cell").fillna("")


def _bold(text: str, row: object) -> str:
    apart = row.difference_high < 0 or row.difference_low > 0  # type: ignore[attr-defined]
    return f"**{text}**" if apart else text


def ratios_of(suite: Suite, method: str, metric: str, region: str) -> pd.Series:
    """The ratio of a method to plain L1 on each set."""
    those = suite.differences
    those = those[(those.method == method) & (those.metric == metric) & (those.region == region)]
    return those.set_index("set")["ratio"].dropna()


def mean_and_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over the first axis, the sets, and their intervals by Student's t."""
    mean = values.mean(0)
    half = t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(0, ddof=1) / np.sqrt(len(values))
    return mean, mean - half, mean + half


def geometric(ratios: pd.Series) -> tuple[float, float, float]:
    """The geometric mean over sets and its interval, which one set does not have."""
    if len(ratios) == 1:
        return float(ratios.iloc[0]), float("nan"), float("nan")
    mean, low, high = (float(np.exp(end)) for end in mean_and_interval(np.log(ratios.to_numpy())))
    return mean, low, high


COLUMNS = {"bMAE": ("bmae", "all"), "few": ("mae", "few"), "MAE": ("mae", "all")}


def over_sets(suite: Suite) -> pd.DataFrame:
    """The geometric mean over sets of each method's ratios to plain L1 and its interval, the best bMAE first."""
    table, order = {}, {}
    for method in suite.rows["method"].unique():
        every = {title: ratios_of(suite, method, *column) for title, column in COLUMNS.items()}
        if method != "l1" and len(every["bMAE"]):
            cells = {title: interval(*geometric(ratios)) for title, ratios in every.items() if len(ratios)}
            table[method] = cells | {"sets": len(every["bMAE"]), "without": lacks(suite, method)}
            order[method] = geometric(every["bMAE"])[0]
    return pd.DataFrame(table).T.loc[sorted(order, key=order.__getitem__)].fillna("")


def interval(mean: float, low: float, high: float) -> str:
    return f"{mean:.2f}" if np.isnan(low) else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def lacks(suite: Suite, method: str) -> str:
    """The sets without results of a method."""
    missing = sorted(set(suite.notes) - set(ratios_of(suite, method, *COLUMNS["bMAE"]).index))
    return ", ".join(f"{name} (failed)" if method in suite.failed[name] else name for name in missing)


OF_LOSSES = ("mse", "lds", "balanced_mse", "ccc", "dist_loss", "srl", "c_mixup", "fds", "lds+fds", "conr", "bsam")
OF_HEADS = (
    "soft",
    "soft+tau",
    "coral",
    "coral+tau",
    "corn",
    "uvote",
    "uvote_bins",
    "long_tail_model",
    "long_tail_model+tau",
    "long_tail_model+bias",
)
NETWORKS = (*OF_LOSSES, *OF_HEADS)
LEAVES = (  # the question, who stands to choose from, the error that chooses, and the largest ratio of the MAE on a set
    ("The rows are a table, and any estimator will do", OF_TABLES, "bMAE", np.inf),
    ("A network; its head is one number and stays", OF_LOSSES, "bMAE", np.inf),
    ("A network; its head may become bins", OF_HEADS, "bMAE", np.inf),
    ("A network; only the rare labels matter", NETWORKS, "few", np.inf),
    ("A network; the mean error may rise by a tenth at most, on any set", NETWORKS, "bMAE", 1.1),
    ("A network; the mean error must not rise", NETWORKS, "MAE", np.inf),
)


def leaves(suite: Suite) -> str:
    """For each question the method with the least mean, what it costs, and the sets on which it failed.

    Only methods with a result on every set that bears on the question are compared, and one is recommended only if the
    interval of its mean lies below 1.
    """
    lines = ["| you have | take | bMAE | few | price: MAE | fails when |", "|---|---|---|---|---|---|"]
    ran = set(suite.rows["method"]).union(*suite.failed.values())
    for question, candidates, title, most in LEAVES:
        every = {m: ratios_of(suite, m, *COLUMNS[title]) for m in candidates if m in ran}
        sets = {name for name in suite.notes if candidates is not OF_TABLES or name not in NOT_TABLES}
        if title == "few":  # some sets have no such label
            sets &= set(suite.differences.query("metric == 'mae' and region == 'few'").dropna(subset="ratio")["set"])
        there = {m: ratios[sorted(sets)] for m, ratios in every.items() if sets <= set(ratios.index)}
        left = [f"`{m}` ({lacks(suite, m) or title})" for m in every if m not in there]
        out = f"not compared, without results on: {', '.join(left)}" if left else ""
        if not there or len(sets) < FEWEST:
            if every:
                lines.append(f"| {question} | no advice: {len(there)} methods on {len(sets)} sets | | | | {out} |")
            continue
        cheap = [m for m in there if (ratios_of(suite, m, *COLUMNS["MAE"]) <= most).all()]
        better = [m for m in cheap if geometric(there[m])[2] < 1]
        if not better:
            lines.append(f"| {question} | plain L1: none of {len(cheap)} is better beyond chance | | | | {out} |")
            continue
        best = min(better, key=lambda method: geometric(there[method])[0])
        shown = {name: ratios_of(suite, best, *column) for name, column in COLUMNS.items()}
        cells = [interval(*geometric(ratios)) if len(ratios) else "" for ratios in shown.values()]
        faults = "; ".join(filter(None, [fails(suite, best), out]))
        lines.append(f"| {question} | `{best}`, best of {len(cheap)} | {' | '.join(cells)} | {faults} |")
    return "\n".join(lines)


def fails(suite: Suite, method: str) -> str:
    """The sets on which a method is worse than plain L1 beyond chance, pays more than a tenth of the MAE, or has no
    result."""
    own = suite.differences[suite.differences.method == method]
    faults = []
    for title, (metric, region) in list(COLUMNS.items())[:2]:
        those = own[(own.metric == metric) & (own.region == region) & (own.difference_low > 0)]
        names = [f"{r.set} {interval(r.ratio, r.ratio_low, r.ratio_high)}" for r in those.itertuples()]
        faults += [f"{title} rises: {', '.join(names)}"] if names else []
    those = own[(own.metric == "mae") & (own.region == "all") & (own.ratio > 1.1)]
    names = [f"{r.set} {interval(r.ratio, r.ratio_low, r.ratio_high)}" for r in those.itertuples()]
    faults += [f"MAE rises by more than a tenth: {', '.join(names)}"] if names else []
    faults += [f"no result: {lacks(suite, method)}"] if lacks(suite, method) else []
    return "; ".join(faults) or "no failure seen on these sets"


def ranks(suite: Suite, most: float = np.inf) -> pd.DataFrame:
    """Sets by methods: the rank by the mean bMAE over seeds, of the methods that were run on every set.

    Methods whose MAE is more than ``most`` times that of plain L1 on a set share the last ranks there.
    """
    both = suite.rows.groupby(["set", "method"])[["bmae", "mae"]].mean().unstack("method")
    dear = both["mae"].gt(most * both["mae"]["l1"], axis=0)
    return both["bmae"].dropna(axis=1).where(~dear, np.inf).rank(axis=1)


def average_ranks(table: pd.DataFrame) -> pd.DataFrame:
    """The mean rank of each method and its interval."""
    mean, low, high = mean_and_interval(table.to_numpy())
    ends = {"from": low.clip(1), "to": high.clip(max=table.shape[1])}
    rows = pd.DataFrame({"rank": mean, **ends}, index=table.columns)
    return rows.sort_values("rank").round(1)


def critical_difference(methods: int, sets: int) -> float:
    """How far apart two average ranks must be by the test of Nemenyi (Demšar 2006)."""
    q = studentized_range.ppf(LEVEL, methods, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(methods * (methods + 1) / (6 * sets)))


@look(grid="x")
def rank_figure(table: pd.DataFrame) -> Figure:
    """Average ranks, the best on top, and a bar as long as the critical difference from the best one."""
    rows = average_ranks(table)
    distance = critical_difference(table.shape[1], len(table))
    figure = new_figure(1.4 + 0.2 * len(rows))
    axes = figure.add_subplot()
    best = rows["rank"].iloc[0]
    axes.axvspan(best, best + distance, color=GREY, alpha=0.2, linewidth=0)
    for i, (low, mean, high) in enumerate(rows[["from", "rank", "to"]].to_numpy()):
        axes.plot([low, high], [i, i], color=INK, linewidth=1.2)
        axes.plot([mean], [i], "o", color=INK, markersize=5)
    axes.set_yticks(range(len(rows)), [literal(name) for name in rows.index])
    axes.invert_yaxis()
    tied = (table.nunique(axis=1) == 1).all()
    chance = 1.0 if tied else friedmanchisquare(*table.to_numpy().T).pvalue
    axes.set_xlabel(
        f"average rank by bMAE over {len(table)} sets, and its 95 % interval\n"
        f"grey: within the critical difference {distance:.1f} of the best (Friedman p = {chance:.1g})"
    )
    return figure


def hours(suite: Suite) -> float:
    tuning = suite.rows.drop_duplicates(["set", "method"])["tuning_seconds"].sum()
    return float(suite.rows["seconds"].sum() + tuning) / 3600


def tables(suite: Suite) -> str:
    parts = [
        "# The suite, all figures",
        "Made by `python benchmarks/suite/report.py`. Mean ± standard deviation over seeds.",
    ]
    titles = {"bmae": "bMAE", "mae": "MAE", "few": "few", "bmase": "bMASE", "crps": "CRPS", "coverage": "coverage"}
    titles["seconds"] = "seconds of a training"
    for error, title in titles.items():
        parts += [f"## {title}", markdown(means(suite, error))]
    for title, error, region in (("bMAE", "bmae", "all"), ("MAE", "mae", "all"), ("few", "mae", "few")):
        parts += [f"## {title}, ratio to plain L1", markdown(ratios(suite, error, region))]
    chosen = suite.rows.drop_duplicates(["set", "method"]).pivot(index="method", columns="set", values="setting")
    parts += ["## Chosen settings", markdown(chosen.fillna("").map(lambda text: text.strip("{}").replace('"', "")))]
    parts += [
        "## Commands, versions, data",
        "Up to commit cd59bee `long_tail_model` was called `long_tail_model+bound`, and `long_tail_model+tau` was "
        "called `long_tail_model`. Commands name methods as they were called then.",
        *(f"- {name}: {line}" for name, those in suite.notes.items() for line in those),
    ]
    return "\n\n".join(parts) + "\n"


def ranked(suite: Suite) -> str:
    """The section on ranks."""
    table = ranks(suite)
    count = table.shape[1]
    if count < FEWEST:
        return f"Ranks are compared from {FEWEST} methods on, and {count} ran on all {len(table)} sets."
    cheap = average_ranks(ranks(suite, 1.1)).add_suffix(" (MAE at most × 1.1)")
    return f"""![Average ranks by bMAE](which-method.png)

By the mean bMAE over seeds, of the {count} methods that ran on all {len(table)} sets. By the test of Nemenyi
two methods differ if their ranks are {critical_difference(count, len(table)):.1f} apart. In the last three columns a
method whose MAE is more than a tenth above that of plain L1 shares the last ranks of the set. This favours
`long_tail_model`, which bounds the same error on validation data.

{markdown(average_ranks(table).join(cheap))}"""


ENSEMBLES = {  # and the one network that each is compared with
    "l1_ensemble": "l1",
    "long_tail_model_ensemble": "long_tail_model",
    "long_tail_model_ensemble+bias": "long_tail_model+bias",
}


def ensembles(suite: Suite) -> str:
    """The section on networks that are averaged."""
    if "ensembles" not in suite.apart:
        return ""
    those = suite.apart["ensembles"]
    beside = {
        name: {
            title: interval(*geometric((ratios_of(those, name, *column) / ratios_of(those, one, *column)).dropna()))
            for title, column in COLUMNS.items()
        }
        for name, one in ENSEMBLES.items()
    }
    times = those.rows["seed"].nunique()
    beside_l1 = {name: ratios_of(those, name, *COLUMNS["MAE"]).drop(list(EVEN), errors="ignore") for name in ENSEMBLES}
    priced = (
        f"Without {', '.join(EVEN)}, whose MAE is no price, the ratio of the MAE to one network with L1 is\n"
        + ",\n".join(f"{interval(*geometric(ratios))} for `{name}`" for name, ratios in beside_l1.items())
    )
    return f"""
## Three networks, averaged

`dt.longtail.ensemble` makes one model of several. It predicts by the mean of their distributions, and is calibrated as
a whole. Each mean here is of three networks, which have the settings that were chosen for one and are not tuned again.
There are {times} such means per set, of {3 * times} networks; the {times} single ones are among these. `l1_ensemble` is
the mean prediction of three networks with L1. All networks were trained anew on another machine, where the single ones
gave the same errors as above. Ratios to one network with L1:

{markdown(over_sets(those))}

Each beside one network of its kind, as a ratio:

{markdown(pd.DataFrame(beside).T)}

{priced}.

Three networks take three times as long to train and to predict. All figures are in `benchmarks/suite/ensembles`.
"""


def faces(suite: Suite) -> str:
    """The section on all faces, on which the leaders alone were tuned."""
    if "faces" not in suite.apart:
        return ""
    parts = f"""
## Faces

{_budget(suite.apart["faces"])}
The methods with the best ranks alone were tuned here, so these figures enter neither means nor ranks.

{_by_region(suite.apart["faces"])}
"""
    if "faces_untuned" in suite.apart:
        parts += f"""
Others were not tuned (`--trials 0`): they have a learning rate of 0.002 and the first of the values that are tried
elsewhere, and so has the L1 with which they are compared.
{_budget(suite.apart["faces_untuned"])}

{_by_region(suite.apart["faces_untuned"])}
"""
    return f"""{parts}
Faces to validate and to test are spread evenly over ages. So the MAE shows no price here, and its bound protects no
common ages: their MAE is in the column *many*. [Ages](ages.md) has trainings of 60 epochs with stronger augmentation.
"""


def _budget(suite: Suite) -> str:
    """How one set was trained, and the error of plain L1."""
    ((rows, epochs, trials),) = suite.rows[["rows", "epochs", "trials"]].drop_duplicates().to_numpy()
    plain = suite.rows[suite.rows["method"] == "l1"]
    tuned = f"{trials} trials" if trials else "no trials"
    return (
        f"{suite.rows['set'].iloc[0]}: {rows:,} faces of 32 pixels to train on, the small residual CNN, {tuned},\n"
        f"{epochs} epochs and {plain['seed'].nunique()} seeds; plain L1 has a bMAE of {plain['bmae'].mean():.2f} ± "
        f"{plain['bmae'].std():.2f} years."
    )


def _by_region(suite: Suite) -> str:
    """The ratios to plain L1 on one set."""
    every = {**COLUMNS, "many": ("mae", "many")}
    table = pd.DataFrame({title: ratios(suite, *column).iloc[:, 0] for title, column in every.items()})
    order = {method: ratios_of(suite, method, *COLUMNS["bMAE"]).iloc[0] for method in table.index}
    return markdown(table.loc[sorted(order, key=order.__getitem__)])


def uci_dir(suite: Suite) -> str:
    """The section on published rows."""
    if "uci_dir" not in suite.apart:
        return ""
    those = suite.apart["uci_dir"]
    ours, seeds = means(those, "mae"), those.rows["seed"].nunique()
    (budget,) = those.rows[["epochs", "trials"]].drop_duplicates().itertuples(index=False)
    cells = {
        name: [
            f"{PUBLISHED[method][name]:.2f}; {ours.loc[method, name]}"
            if method in PUBLISHED
            else ours.loc[method, name]
            for method in ours.index
        ]
        for name in ours.columns
    }
    return f"""
## Beside published rows

UCI-DIR (Dong et al. 2025) has a test set whose labels are spread evenly, and a perceptron with layers of 20, 30 and 10.
We found neither its split nor its learning rate and epochs, so errors need not agree. Compare the order of methods. MAE
over all test labels: published; ours, mean ± standard deviation over {seeds} seeds, with {budget.trials} trials and
{budget.epochs} epochs. "l1" is the paper's "vanilla".

{markdown(pd.DataFrame(cells, index=ours.index))}
"""


def without_few(suite: Suite) -> str:
    """A remark on the sets without such labels."""
    every = {error: suite.differences.query("metric == 'mae' and region == @error") for error in ("all", "few")}
    every = {error: set(those.dropna(subset="ratio")["set"]) for error, those in every.items()}
    missing = sorted(every["all"] - every["few"])
    return f", which {', '.join(missing)} does not have" if missing else ""


def even_labels(suite: Suite) -> str:
    """A remark on sets whose test labels are spread evenly, on which the MAE is no price."""
    those = ratios_of(suite, "long_tail_model", *COLUMNS["MAE"])
    if not set(EVEN) & set(those.index) or len(those) < FEWEST:
        return ""
    return (
        f"\n\nTest labels of {', '.join(EVEN)} are spread evenly, so that its MAE is no price. Without it the MAE of\n"
        f"`long_tail_model` is {interval(*geometric(those.drop(list(EVEN))))}."
    )


def page(suite: Suite) -> str:
    rows = suite.rows
    names = sorted(rows["set"].unique())
    seeds = rows.groupby(["set", "method"])["seed"].nunique()
    seeds_text, trials, epochs = (
        f"{low}" if low == high else f"{low} to {high}"
        for low, high in ((column.min(), column.max()) for column in (seeds, rows["trials"], rows["epochs"]))
    )
    budget = [f"{name} {part['rows'].iloc[0]:,}" for name, part in rows.groupby("set")]
    return f"""# Which method?

All figures are ratios to a plain network trained with L1: below 1 is better. Each is the geometric mean over those of
{len(names)} sets that have it, with its 95 % interval by Student's t over sets. **These are few sets, few seeds and a
short budget: read the intervals, not the means.** More on faces is on [another page](ages.md).

{leaves(suite)}

"few" is the MAE of labels in bins of fewer than 20 training rows{without_few(suite)}. A method fails on a set if the
95 % interval of its paired difference to L1 in bMAE or "few", over seeds and test samples, lies above 0, if its MAE is
more than a tenth higher, or if it has no result there.{even_labels(suite)}

The method of each line was chosen as the one with the best mean on these same test data, so its advantage is somewhat
overstated. It is named only if it has results on every set that the question is about and its interval lies below 1.
Settings were chosen by the bMAE of validation data alone, which is why the MAE may rise so far; `most_mae=` of
`calibrate` and of the estimators bounds it.

`python benchmarks/suite/report.py` makes this page from the results in `benchmarks/suite`, to which
`python recipes/studies/suite.py --root DIR --resume --results benchmarks/suite` adds. So far they hold {len(names)}
sets (training rows: {", ".join(budget)}) and {rows["method"].nunique()} methods, of which each network
that is tuned has {trials} trials on validation data, {epochs} epochs and {seeds_text} seeds:
{hours(suite):.2f} hours of training, in which a training that methods share counts for each. Labels of all parts, test
included, are clipped to the range of the training labels.
Errors of house16H are those of log1p of the price, and its 52 prices of 0 count as the next lowest.

## All methods

{markdown(over_sets(suite))}

`median` predicts one number. Names are those of `recipes/studies/suite.py`, and [methods](methods.md) says what they
are. `long_tail_model` is `dt.LongTailModel` with its defaults and `calibrate()`, which lets the MAE of validation data
rise by a tenth at most. With `+tau` it is `calibrate(most_mae=None, bias=False)`, and with `+bias`
`calibrate(most_mae=None, bias=True)`. `soft+tau` differs from `long_tail_model+tau` in what is tuned, the width of the
soft labels in place of the weight decay, and in how tau is chosen, by `choose_tau` at temperature 1.

`median`, `long_tail_regressor` and boosting are not tuned. The estimators read no text, and `long_tail_regressor` reads
tables alone. What a training costs is not compared, since the
machine was busy with other work; `bsam` takes two passes per step.

## bMAE on each set

The ratio to plain L1, and its 95 % interval over seeds and test samples. Bold: the interval of the difference excludes
0. Of many intervals, some do by chance.

{markdown(ratios(suite, "bmae"))}

All figures, chosen settings, commands, versions and digests are in `benchmarks/suite/tables.md`.
{ensembles(suite)}{faces(suite)}{uci_dir(suite)}
## Average ranks

{ranked(suite)}
"""


def main(folder: Path, docs: Path) -> None:
    suite = read(folder)
    for place, part in ((folder, suite), *((folder / name, part) for name, part in suite.apart.items())):
        (place / "tables.md").write_text(tables(part), encoding="utf-8")
    table = ranks(suite)
    if len(table) < FEWEST:
        print(f"The page needs {FEWEST} sets, and {folder} has {len(table)}. Only its tables.md was written.")
        return
    if table.shape[1] >= FEWEST:
        save_figure(rank_figure(table), docs / "which-method.png")
    (docs / "which-method.md").write_text(page(suite), encoding="utf-8")
    print(f"{over_sets(suite).to_string()}\n\n{average_ranks(table).to_string()}\n\n{hours(suite):.2f} hours")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE, help="of the results")
    parser.add_argument("--docs", type=Path, default=DOCS, help="of the page")
    given = parser.parse_args()
    main(given.folder, given.docs)
