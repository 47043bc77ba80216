"""Figures 5 (slack, margin), D4a (lambda), D1 (convergence): runs, tables, pictures, claims."""

import functools
import operator

import numpy as np
import pandas as pd

from cll.experiment.schema import experiment_params, sized_as
from cll.losses import cll_scale

from . import records, style
from .records import TRUE_MARGIN, cell_text, or_dash, published, same_data
from .style import BLUE, GREEN, ORANGE

CURVES = {  # of the methods that figures 5 and D1 compare
    "CLL": {"color": BLUE, "ls": "-", "marker": "o", "ms": 4},
    "GloRo": {"color": ORANGE, "ls": "--", "marker": "s", "ms": 4},
}
CLEAN = {"color": GREEN, "ls": "-.", "marker": "^", "ms": 4}  # clean accuracy, beside CRA
OPEN = {"ls": "", "mfc": "white", "zorder": 3, "clip_on": False}  # the paper's values


# -------------------------------------------------------------------------------------------- runs
# rows of table 2 that belong to a sweep; where that table is finished they are read
ROWS = {"figure5": ("T2-03", "T2-05"), "lambda_sweep": ("T2-05",), "convergence": ()}


def runs(exhibit, profile, seeds=None, **overrides):
    """The image runs of "figure5", "lambda_sweep" or "convergence": those of params/<exhibit>/ and
    of ROWS. seeds: None takes those of the profile. overrides: of parameters, as device, data."""
    sweep = experiment_params(exhibit, profile, seeds, **overrides)
    table2 = records.runs_beside(sweep, "table2", profile, **overrides)
    return sweep + sized_as(sweep[0], [run for run in table2 if run.row in ROWS[exhibit]])


def lambda_runs(profile, seeds=None, data="", label="", **overrides):
    """(images, two moons) over lambda; two moons with the slack sweep's runs at the same slack.

    seeds: None takes those of the images' profile. data, label: of the images.
    """
    images = runs("lambda_sweep", profile, seeds, data=data, label=label, **overrides)
    moons = records.runs_beside(images, "lambda_moons", profile, **overrides)
    slack = records.runs_beside(images, "slack_sweep", profile, **overrides)
    return images, moons + [run for run in slack if run.loss.p == moons[0].loss.p]


# ------------------------------------------------------------------------------------------ tables
def sweep_table(results):
    """Runs by method, epsilon, p and lambda: means over the seeds, guaranteed bound, test samples.

    Returns one line each: method, epsilon, p, lambda (nan where the loss has none), n (seeds),
    clean, cra (at the training margin) and tightness in percent, K_f, K_hf, the standard deviations
    of clean and cra, and where figure 5 prints that run's CRA, it and the difference (nan on other
    data than CIFAR-10).
    """
    by = records.BY_MARGIN | {"lambda": lambda r: r["params"]["loss"].get("lambda")}
    values = {"clean": lambda r: 100 * r["clean"]} | records.CONSTANTS
    values |= {"cra": lambda r: 100 * r["cra"][f"{r['epsilon']:g}"]}
    printed, lines = published("figure5").dropna(subset=["cra_at_eps"]), []
    for line, group in records.summary(results, by, values):
        row = printed[printed["method"].eq(line["method"]) & printed["epsilon"].eq(line["epsilon"])]
        for key in ("p", "lambda") if line["method"] == "CLL" else ():
            row = row[np.isclose(row[key], line[key])]
        known = len(row) and group[0]["data"] != "two_moons"
        line["cra_published"] = row["cra_at_eps"].iloc[0] if known else np.nan
        if all(same_data(r, "CIFAR-10") for r in group):
            line["difference"] = line["cra"] - line["cra_published"]
        tightness = [r["tightness"] for r in group if r.get("tightness") is not None]
        lines.append(line | {"tightness": 100 * np.mean(tightness) if tightness else np.nan})
    names = ["method", "epsilon", "p", "lambda", "n", "clean", "cra", "K_f", "K_hf", "tightness"]
    names += ["clean_std", "cra_std", "cra_published", "difference"]
    table = pd.DataFrame(lines, columns=names)
    table = table.astype(dict.fromkeys(names[1:4] + names[5:], float))
    return table.sort_values(["method", "epsilon", "p", "lambda"], ignore_index=True)


def display_sweep(table):
    """The frame of `sweep_table` for reading: strings, accuracies as mean ± std over the seeds."""
    columns = {
        "method": table["method"],
        "ε": table["epsilon"].map("{:g}".format),
        "p": [or_dash("g", p) for p in table["p"]],
        "λ": [or_dash(".1e", weight) for weight in table["lambda"]],
        "seeds": table["n"].map(str),
        "clean %": map(cell_text, table["clean"], table["clean_std"]),
        "CRA(ε) %": map(cell_text, table["cra"], table["cra_std"], table["difference"]),
        "paper": map(cell_text, table["cra_published"]),
        "K(f)": table["K_f"].map("{:.2f}".format),
        "K(h∘f)": table["K_hf"].map("{:.2f}".format),
        "tightness %": map(cell_text, table["tightness"]),
    }
    return records.display_lines(columns, ["method", "ε", "p", "λ"], columns)


def gain_table(table):
    """The table of figure 5 from the frame of `sweep_table`: CRA(epsilon) of GloRo and CLL at each
    printed margin in percent, CLL's relative gain in percent, and the three as printed.

    A margin at which one of the two was not run has nan there.
    """
    printed = published("figure5").query("panel == 'eps_sweep_table'")
    printed = printed.pivot(index="epsilon", columns="method", values="cra_at_eps")
    sweep = table[table["p"].isna() | np.isclose(table["p"], 0.3)]
    measured = sweep.set_index(["method", "epsilon"])["cra"]
    gains = pd.DataFrame({"epsilon": printed.index})
    for end, cra in (("", measured), ("_published", printed.unstack())):
        for method in ("GloRo", "CLL"):
            gains[method + end] = [cra.get((method, epsilon), np.nan) for epsilon in printed.index]
        ratio = gains["CLL" + end] / gains["GloRo" + end].where(lambda gloro: gloro > 0)
        gains["gain" + end] = 100 * (ratio - 1)
    methods = ["GloRo", "CLL"]
    return gains[["epsilon", *methods, "gain", *(f"{m}_published" for m in [*methods, "gain"])]]


def display_gains(gains):
    """The frame of `gain_table` for reading, laid out as in the paper: a column per margin."""
    lines = {}
    for where, end in (("here", ""), ("paper", "_published")):
        for name, form in (("GloRo", ".1f"), ("CLL", ".1f"), ("gain", "+.1f")):
            head = "relative gain %" if name == "gain" else f"{name}, CRA(ε) %"
            lines[head, where] = [or_dash(form, value) for value in gains[name + end]]
    columns = [f"ε = {epsilon:g}" for epsilon in gains["epsilon"]]
    frame = pd.DataFrame.from_dict(lines, orient="index", columns=columns)
    frame.index = pd.MultiIndex.from_tuples(frame.index, names=["", "source"])
    return frame


def snapshot_table(results):
    """Runs with snapshots, a line per method and epoch: means over the seeds of clean, cra (at the
    training margin) and tightness in percent, and K_f; guaranteed bound, test samples."""
    lines = []
    for r in results:
        for s in r.get("snapshots", []):
            line = {"method": r["method"], "epoch": s["epoch"], "clean": 100 * s["clean"]}
            line |= {"cra": 100 * s["cra"][f"{r['epsilon']:g}"], "K_f": s["K_f"]}
            lines.append(line | {"tightness": 100 * s.get("tightness", np.nan)})
    names = ["method", "epoch", "clean", "cra", "K_f", "tightness"]
    return pd.DataFrame(lines, columns=names).groupby(["method", "epoch"], as_index=False).mean()


def display_snapshots(table):
    """The frame of `snapshot_table` for reading."""
    shown = table.set_index(["method", "epoch"]).map("{:.1f}".format)
    return shown.set_axis(["clean %", "CRA(ε) %", "K(f)", "tightness %"], axis=1)


def reached(epochs, values, share=0.95):
    """The first epoch at which values (in order of epochs) are at `share` of their last one."""
    values = np.asarray(values, float)
    there = np.flatnonzero(values >= share * values[-1]) if len(values) else []
    return float(np.asarray(epochs)[there[0]]) if len(there) else np.nan


def lambda_slope(table):
    """(exponent, factor) of the power law K_f = factor * lambda^exponent, fitted to the frame of
    `sweep_table` by least squares of the logarithms; nan with fewer than two values of lambda."""
    if table["lambda"].nunique() < 2:
        return np.nan, np.nan
    exponent, factor = np.polyfit(np.log(table["lambda"]), np.log(table["K_f"]), 1)
    return exponent, np.exp(factor)


# ---------------------------------------------------------------------------------------- pictures
@style.of_runs
def figure5(results):
    """Figure 5: slack sweep (left), CRA over the margin (the numbers of the paper's table), K and
    tightness over the margin. Means over the seeds; open marks: what the paper prints.

    results: records of `runs` in any order; what is missing leaves a gap.
    """
    table = sweep_table(results)
    same = all(same_data(r, "CIFAR-10") for r in results)
    figure, (left, certified, constants, tight) = style.subplots((10, 3.1), 1, 4)
    slack = table[(table["method"] == "CLL") & np.isclose(table["epsilon"], TRUE_MARGIN)]
    _accuracies(left, slack.sort_values("p"), "p", "CRA(0.15)")
    left.set(xlabel="slack p", ylabel="accuracy (%)", xlim=(0, 0.75))
    left.set_title("slack, CLL at ε = 0.15")
    for method, curve in CURVES.items():
        sweep = table[(table["method"] == method)]
        sweep = sweep[sweep["p"].isna() | np.isclose(sweep["p"], 0.3)].sort_values("epsilon")
        certified.plot(sweep["epsilon"], sweep["cra"], label=method, **curve)
        constants.plot(sweep["epsilon"], sweep["K_f"], label=f"{method}, $K^{{(f)}}$", **curve)
        tight.plot(sweep["epsilon"], sweep["tightness"], label=method, **curve)
        if method == "CLL":
            at = np.linspace(0.13, 1.3, 100)
            law = [1 / float(cll_scale(float(e), 0.3)) for e in at]
            constants.plot(at, law, color=BLUE, ls=":", label="CLL, $K^{(h∘f)}$")
    if same:
        _figure5_printed(left, certified, constants, tight)
    certified.set(ylabel="CRA at the trained ε (%)", title="certified accuracy")
    style.log_y(constants)
    constants.set(ylabel="Lipschitz constant", title="K")
    tight.set(ylabel="tightness (%)", title="tightness")
    for ax in (certified, constants, tight):
        ax.set(xlabel="training margin ε", xlim=(0, 1.4))
    for ax in (left, certified, tight):  # room for the legend
        values = np.concatenate([line.get_ydata() for line in ax.get_lines()])
        ax.set_ylim(0, max(1, 1.35 * np.nanmax(values, initial=0)))
    low, high = constants.get_ylim()
    constants.set_ylim(low, high * (high / low) ** 0.45)
    for ax in (left, certified, constants, tight):
        ax.legend(loc="upper right", labelspacing=0.2, handlelength=2.4)
    marks = " · open marks: the paper's values" * same
    return style.titled(figure, records.caption(results, tightness=True) + marks)


def _figure5_printed(left, certified, constants, tight):
    """The paper's values: rings and smaller squares, so that neither hides the other."""
    printed = published("figure5").query("panel == 'eps_sweep_table'")
    for method, curve in CURVES.items():
        rows = printed[printed["method"] == method]
        mark = OPEN | {"marker": curve["marker"], "mec": curve["color"], "mfc": "none"}
        mark["ms"] = 8 if method == "CLL" else 5
        certified.plot(rows["epsilon"], rows["cra_at_eps"], **mark)
        constants.plot(rows["epsilon"], rows["k_f"], **mark)
        tight.plot(rows["epsilon"], rows["tightness"], **mark)
        if method == "CLL":
            rows = rows.dropna(subset=["clean"])
            left.plot(rows["p"], rows["clean"], **OPEN, marker="^", mec=GREEN, ms=6)
            left.plot(rows["p"], rows["cra_at_eps"], **mark)


def _accuracies(ax, table, over, margin):
    """Clean accuracy and CRA of CLL over a column of `sweep_table`."""
    ax.plot(table[over], table["clean"], label="clean", **CLEAN)
    ax.plot(table[over], table["cra"], label=margin, **CURVES["CLL"])


@style.of_runs
def convergence_figure(results):
    """Figure D1: tightness, CRA at the training margin and K while CLL and GloRo train.

    results: records of runs with snapshots; means over the seeds. Rings: where a curve is first at
    95 % of its last value.
    """
    table = snapshot_table(results)
    figure, axes = style.subplots((9, 2.9), 1, 3)
    margin = f"CRA at ε = {results[0]['epsilon']:g} (%)"
    measures = {"tightness": "tightness (%)", "cra": margin, "K_f": "K(f), guaranteed"}
    for ax, (column, label) in zip(axes, measures.items(), strict=True):
        for method, curve in CURVES.items():
            run = table[table["method"] == method].set_index("epoch")[column]
            if run.empty:
                continue
            ax.plot(run.index, run, label=method, **curve)
            at = reached(run.index, run)
            if column != "K_f" and np.isfinite(at):
                ax.plot(at, run[at], "o", ms=10, mfc="none", mec=curve["color"])
        ax.set(xlabel="epoch", ylabel=label)
        if table["epoch"].max() > 30:
            ax.set_xscale("log")
        else:
            ax.xaxis.get_major_locator().set_params(integer=True)
    style.log_y(axes[2])
    for ax in axes[:2]:
        ax.set_ylim(0)
    axes[1].legend(loc="best")
    rings = " · rings: first at 95 % of the last value"
    return style.titled(figure, records.caption(results, tightness=True) + rings)


@style.styled
def lambda_figure(images, moons):
    """Figure D4a: accuracies (left) and K(f) (right) over lambda, for images and for two moons.

    images, moons: result records of CLL with several lambda. The dashed line is the prediction
    K(f) proportional to lambda^(-1/2) through the middle of the measured values, the dotted one the
    fitted power law.
    """
    figure, axes = style.subplots((9, 5.4), 2, 2)
    for (accuracy, constant), results in zip(axes, (images, moons), strict=True):
        if not results:
            for ax in (accuracy, constant):
                ax.text(0.5, 0.5, "not run", ha="center", transform=ax.transAxes)
                ax.set_axis_off()
            continue
        table = sweep_table(results)
        _accuracies(accuracy, table, "lambda", f"CRA({table['epsilon'].iloc[0]:g})")
        shown = f"{results[0]['model']}, {records.data_source(results[0])}"
        accuracy.set(ylim=(0, 105), ylabel=f"{shown}\naccuracy (%)")
        _power_law(constant, table)
        style.log_y(constant)
        constant.set_ylabel("K(f), guaranteed")
        if all(same_data(r, "CIFAR-10") for r in results):
            row = published("table2").loc["T2-05"]
            mark = OPEN | {"marker": "o", "mec": BLUE, "ms": 7}
            constant.plot(1e-4, row["k_f"], label="paper (power iteration)", **mark)
            accuracy.plot(1e-4, row["clean"], **OPEN, marker="^", mec=GREEN, ms=7)
        for ax in (accuracy, constant):
            ax.set(xscale="log", xlabel="λ, weight of K²")
        accuracy.legend(loc="lower left", ncols=2)
        constant.legend(loc="upper right")
    return style.titled(figure, f"{records.caption(images)} · below: {records.caption(moons)}")


def _power_law(ax, table):
    """K(f) over lambda: measured, predicted and fitted."""
    lam, K = table["lambda"], table["K_f"]
    ax.plot(lam, K, label="measured", ls="", color=BLUE, marker="o", ms=5)
    if lam.nunique() > 1:
        middle = np.exp(np.log(K).mean() + 0.5 * np.log(lam).mean())
        ax.plot(lam, middle * lam**-0.5, color="black", ls="--", label="predicted: λ$^{-1/2}$")
        exponent, factor = lambda_slope(table)
        label = f"fitted: λ$^{{{exponent:.2f}}}$".replace("-", "−")
        ax.plot(lam, factor * lam**exponent, color=ORANGE, ls=":", label=label)


# ------------------------------------------------------------------------------------------ claims
def _gains_three_percent(cll, gloro):
    return cll > gloro and (gloro == 0 or round(100 * cll / gloro, 1) >= 103)


def figure5_claims(results):
    """What the paper says of figure 5, see `claims.judge`."""
    table = sweep_table(results or [])
    gains = gain_table(table)
    if results is None:  # the printed numbers are judged
        gains[["GloRo", "CLL"]] = gains[["GloRo_published", "CLL_published"]]
    grid = published("figure5").query("panel == 'slack_sweep_4C3F_left'")["p"]
    slack = table[(table["method"] == "CLL") & np.isclose(table["epsilon"], 0.15)]
    slack = [slack[np.isclose(slack["p"], p)].mean(numeric_only=True) for p in grid]
    clean, cra = ([line.get(column, np.nan) for line in slack] for column in ("clean", "cra"))
    form = ", ".join(["{:.1f}"] * len(grid))
    claim = "S7: more slack costs clean accuracy (largest p below smallest)"
    yield "slack-clean", claim, "falls with p", form, clean, lambda *c: c[-1] < c[0]
    claim = "S7: more slack first raises CRA (its peak is not at the smallest p)"
    yield "slack-cra", claim, "rises to a peak", form, cra, lambda *c: max(c) > c[0]

    claim = "E1: CLL's CRA(ε) is 3 % (relative) or more above GloRo's at every ε"
    printed = ", ".join(f"{gain:+.1f}" for gain in gains["gain_published"])
    form, pairs = ", ".join(["{:.1f} vs {:.1f}"] * len(gains)), gains[["CLL", "GloRo"]]
    holds = functools.partial(records.in_all, _gains_three_percent)
    yield "gain", claim, printed, form, pairs.to_numpy().ravel(), holds
    sweep = table[table["p"].isna() | np.isclose(table["p"], 0.3)].set_index(["method", "epsilon"])
    above = functools.partial(records.in_all, operator.gt)
    for column, name in [("K_f", "K(f)"), ("K_hf", "K(h∘f)"), ("tightness", "tightness")]:
        keys = [(method, epsilon) for epsilon in gains["epsilon"] for method in ("CLL", "GloRo")]
        pairs = [sweep[column].get(key, np.nan) for key in keys]
        yield (
            column,
            f"E2: CLL's {name} is above GloRo's at every ε",
            "CLL > GloRo",
            form,
            pairs,
            above,
        )


def convergence_claims(results):
    """What the paper says of figure D1, see `claims.judge`."""
    table = snapshot_table(results)
    for column, name in [("cra", "CRA"), ("tightness", "tightness")]:
        epochs = []
        for method in ("CLL", "GloRo"):
            run = table[table["method"] == method]
            epochs.append(reached(run["epoch"], run[column]))
        claim = f"S4: CLL reaches 95 % of its last {name} in fewer epochs"
        yield column, claim, "CLL before GloRo", "epoch {:.0f} vs {:.0f}", epochs, operator.lt


def lambda_claims(results):
    """What the paper says of the weight of the penalty, see `claims.judge`."""
    table = sweep_table(results)
    lam, K = table["lambda"].to_numpy(), table["K_f"].to_numpy()
    many = len(table) > 2
    claim = "S3: K(f) takes any value that λ lets it have (λ up, K(f) down)"
    ends = K[[0, -1]] if many else [np.nan]
    yield "any-K", claim, "set by λ", "{:.1f} to {:.1f}", ends, operator.gt
    claim = "S3: K(f) ∝ λ^(-1/2) (fitted exponent within 0.1)"
    slope = lambda_slope(table)[0] if many else np.nan
    yield "law", claim, "– (derived: -0.5)", "{:.2f}", [slope], lambda b: abs(b + 0.5) <= 0.1
    flat = [
        np.log10(lam[j] / lam[i])
        for i in range(len(table))
        for j in range(i, len(table))
        if all(np.ptp(table[c].to_numpy()[i : j + 1]) <= 1 for c in ("clean", "cra"))
    ]
    decades = max(flat, default=np.nan) if many else np.nan
    claim = "E3: insensitive to λ: clean and CRA each within a point over two decades"
    yield "flat", claim, "a wide range", "{:.1f} decades", [decades], lambda d: d >= 1.99
