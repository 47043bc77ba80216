"""Figure 5, the lambda sweep and the convergence of appendix D: tables, pictures, claims."""

import functools

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cll.losses import cll_scale

from .records import (
    ABOVE,
    BELOW,
    BY_MARGIN,
    CONSTANTS,
    TRUE_MARGIN,
    _cell,
    _in_all,
    _or_dash,
    _shown,
    _summary,
    caption,
    data_source,
    published,
    same_data,
)
from .style import BLUE, GREEN, ORANGE, _log_y, _subplots, _title, of_runs, styled


def sweep_table(results):
    """Runs by method, epsilon, p and lambda: means over the seeds, guaranteed bound, test samples.

    Returns one line each: method, epsilon, p, lambda (nan where the loss has none), n (seeds),
    clean, cra (at the training margin) and tightness in percent, K_f, K_hf, the standard deviations
    of clean and cra, and where figure 5 prints that run's CRA, it and the difference (nan on other
    data than CIFAR-10).
    """
    by = BY_MARGIN | {"lambda": lambda r: r["params"]["loss"].get("lambda")}
    values = {"clean": lambda r: 100 * r["clean"]} | CONSTANTS
    values |= {"cra": lambda r: 100 * r["cra"][f"{r['epsilon']:g}"]}
    printed, lines = published("figure5").dropna(subset=["cra_at_eps"]), []
    for line, runs in _summary(results, by, values):
        row = printed[printed["method"].eq(line["method"]) & printed["epsilon"].eq(line["epsilon"])]
        for key in ("p", "lambda") if line["method"] == "CLL" else ():
            row = row[np.isclose(row[key], line[key])]
        known = len(row) and runs[0]["data"] != "two_moons"
        line["cra_published"] = row["cra_at_eps"].iloc[0] if known else np.nan
        if all(same_data(r, "CIFAR-10") for r in runs):
            line["difference"] = line["cra"] - line["cra_published"]
        tightness = [r["tightness"] for r in runs if r.get("tightness") is not None]
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
        "p": [_or_dash("g", p) for p in table["p"]],
        "λ": [_or_dash(".1e", weight) for weight in table["lambda"]],
        "seeds": table["n"].map(str),
        "clean %": map(_cell, table["clean"], table["clean_std"]),
        "CRA(ε) %": map(_cell, table["cra"], table["cra_std"], table["difference"]),
        "paper": map(_cell, table["cra_published"]),
        "K(f)": table["K_f"].map("{:.2f}".format),
        "K(h∘f)": table["K_hf"].map("{:.2f}".format),
        "tightness %": map(_cell, table["tightness"]),
    }
    return _shown(pd.DataFrame(columns).to_dict("records"), ["method", "ε", "p", "λ"], columns)


def gain_table(table):
    """The table of figure 5 from the frame of `sweep_table`: CRA(epsilon) of GloRo and CLL at each
    printed margin in percent, CLL's relative gain in percent, and the three as printed.

    A margin at which one of the two was not run has nan there.
    """
    printed = published("figure5").query("panel == 'eps_sweep_table'").set_index("method")
    lines = []
    for epsilon in printed["epsilon"].unique():
        paper = printed[printed["epsilon"] == epsilon]["cra_at_eps"]
        ours = table[np.isclose(table["epsilon"], epsilon)]
        ours = ours[(ours["method"] == "GloRo") | np.isclose(ours["p"], 0.3)].set_index("method")
        gloro, cll = (ours["cra"].get(method, np.nan) for method in ("GloRo", "CLL"))
        lines.append(
            {
                "epsilon": epsilon,
                "GloRo": gloro,
                "CLL": cll,
                "gain": 100 * (cll / gloro - 1) if gloro > 0 else np.nan,
                "GloRo_published": paper["GloRo"],
                "CLL_published": paper["CLL"],
                "gain_published": 100 * (paper["CLL"] / paper["GloRo"] - 1),
            }
        )
    return pd.DataFrame(lines)


def display_gains(gains):
    """The frame of `gain_table` for reading, laid out as in the paper: a column per margin."""

    def row(column, form):
        return [_or_dash(form, v) for v in gains[column]]

    lines = {}
    for where, end in (("here", ""), ("paper", "_published")):
        for method in ("GloRo", "CLL"):
            lines[f"{method}, CRA(ε) %", where] = row(method + end, ".1f")
        lines["relative gain %", where] = row("gain" + end, "+.1f")
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


def _figure5_claims(results):
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
    yield claim, "falls with p", form, clean, lambda *c: c[-1] < c[0]
    claim = "S7: more slack first raises CRA (its peak is not at the smallest p)"
    yield claim, "rises to a peak", form, cra, lambda *c: max(c) > c[0]

    def gains_three(cll, gloro):
        return cll > gloro and (gloro == 0 or round(100 * cll / gloro, 1) >= 103)

    claim = "E1: CLL's CRA(ε) is 3 % (relative) or more above GloRo's at every ε"
    printed = ", ".join(f"{gain:+.1f}" for gain in gains["gain_published"])
    form, pairs = ", ".join(["{:.1f} vs {:.1f}"] * len(gains)), gains[["CLL", "GloRo"]]
    yield claim, printed, form, pairs.to_numpy().ravel(), functools.partial(_in_all, gains_three)
    cll = table[(table["method"] == "CLL") & np.isclose(table["p"], 0.3)].set_index("epsilon")
    gloro = table[table["method"] == "GloRo"].set_index("epsilon")
    for column, name in [("K_f", "K(f)"), ("K_hf", "K(h∘f)"), ("tightness", "tightness")]:
        pairs = []
        for epsilon in gains["epsilon"]:
            pairs += [frame[column].get(epsilon, np.nan) for frame in (cll, gloro)]
        claim = f"E2: CLL's {name} is above GloRo's at every ε"
        yield claim, "CLL > GloRo", form, pairs, functools.partial(_in_all, ABOVE)


def _convergence_claims(results):
    table = snapshot_table(results) if results else pd.DataFrame(columns=["method"])
    for column, name in [("cra", "CRA"), ("tightness", "tightness")]:
        epochs = []
        for method in ("CLL", "GloRo"):
            own = table[table["method"] == method]
            epochs.append(reached(own["epoch"], own[column]) if len(own) else np.nan)
        claim = f"S4: CLL reaches 95 % of its last {name} in fewer epochs"
        yield claim, "CLL before GloRo", "epoch {:.0f} vs {:.0f}", epochs, BELOW


def _lambda_claims(results):
    table = sweep_table(results)
    lam, K = table["lambda"].to_numpy(), table["K_f"].to_numpy()
    many = len(table) > 2
    claim = "S3: K(f) takes any value that λ lets it have (λ up, K(f) down)"
    yield claim, "set by λ", "{:.1f} to {:.1f}", K[[0, -1]] if many else [np.nan], ABOVE
    claim = "S3: K(f) ∝ λ^(-1/2) (fitted exponent within 0.1)"
    slope = lambda_slope(table)[0] if many else np.nan
    yield claim, "– (derived: -0.5)", "{:.2f}", [slope], lambda b: abs(b + 0.5) <= 0.1
    flat = [
        np.log10(lam[j] / lam[i])
        for i in range(len(table))
        for j in range(i, len(table))
        if all(np.ptp(table[c].to_numpy()[i : j + 1]) <= 1 for c in ("clean", "cra"))
    ]
    decades = max(flat, default=np.nan) if many else np.nan
    claim = "E3: insensitive to λ: clean and CRA each within a point over two decades"
    yield claim, "a wide range", "{:.1f} decades", [decades], lambda d: d >= 1.99


LINES = {  # of the methods that figures 5 and D1 compare
    "CLL": {"color": BLUE, "ls": "-", "marker": "o", "ms": 4},
    "GloRo": {"color": ORANGE, "ls": "--", "marker": "s", "ms": 4},
}
OPEN = {"ls": "", "mfc": "white", "zorder": 3, "clip_on": False}  # the paper's values


@of_runs
def figure5(results):
    """Figure 5: slack sweep (left), CRA over the margin (the numbers of the paper's table), K and
    tightness over the margin. Means over the seeds; open marks: what the paper prints.

    results: records of the runs of params/figure5 and of rows T2-03 and T2-05 in any order; what is
    missing leaves a gap.
    """
    table = sweep_table(results)
    printed = published("figure5").query("panel == 'eps_sweep_table'")
    cll = table[table["method"] == "CLL"]
    slack = cll[np.isclose(cll["epsilon"], TRUE_MARGIN)].sort_values("p")
    figure, (left, certified, constants, tight) = _subplots((10, 3.1), 1, 4)
    clean = {"color": GREEN, "ls": "-.", "marker": "^", "ms": 4}
    left.plot(slack["p"], slack["clean"], label="clean", **clean)
    left.plot(slack["p"], slack["cra"], label="CRA(0.15)", **LINES["CLL"])
    left.set_xlabel("slack p")
    left.set_ylabel("accuracy (%)")
    left.set_xlim(0, 0.75)
    left.set_title("slack, CLL at ε = 0.15")

    same = all(same_data(r, "CIFAR-10") for r in results)
    for method, line in LINES.items():
        own = table[(table["method"] == method)]
        own = own[own["p"].isna() | np.isclose(own["p"], 0.3)].sort_values("epsilon")
        certified.plot(own["epsilon"], own["cra"], label=method, **line)
        constants.plot(own["epsilon"], own["K_f"], label=f"{method}, $K^{{(f)}}$", **line)
        tight.plot(own["epsilon"], own["tightness"], label=method, **line)
        if method == "CLL":
            at = np.linspace(0.13, 1.3, 100)
            law = 1 / np.array([float(cll_scale(float(e), 0.3)) for e in at])
            constants.plot(at, law, color=BLUE, ls=":", label="CLL, $K^{(h∘f)}$")
        if same:
            own = printed[printed["method"] == method]
            # rings and smaller squares, so that neither hides the other
            mark = OPEN | {"marker": line["marker"], "mec": line["color"], "mfc": "none"}
            mark["ms"] = 8 if method == "CLL" else 5
            certified.plot(own["epsilon"], own["cra_at_eps"], **mark)
            constants.plot(own["epsilon"], own["k_f"], **mark)
            tight.plot(own["epsilon"], own["tightness"], **mark)
            if method == "CLL":
                own = own.dropna(subset=["clean"])
                left.plot(own["p"], own["clean"], **OPEN, marker="^", mec=GREEN, ms=6)
                left.plot(own["p"], own["cra_at_eps"], **mark)
    certified.set(ylabel="CRA at the trained ε (%)", title="certified accuracy")
    _log_y(constants)
    constants.set(ylabel="Lipschitz constant", title="K")
    tight.set(ylabel="tightness (%)", title="tightness")
    for ax in (certified, constants, tight):
        ax.set(xlabel="training margin ε", xlim=(0, 1.4))
    for ax in (left, certified, tight):
        values = np.concatenate([line.get_ydata() for line in ax.get_lines()])
        ax.set_ylim(0, max(1, 1.35 * np.nanmax(values, initial=0)))
    low, high = constants.get_ylim()
    constants.set_ylim(low, high * (high / low) ** 0.45)
    for ax in (left, certified, constants, tight):
        ax.legend(loc="upper right", labelspacing=0.2, handlelength=2.4)
    return _title(
        figure, caption(results, tightness=True) + " · open marks: the paper's values" * same
    )


@of_runs
def convergence_figure(results):
    """Figure D1: tightness, CRA at the training margin and K while CLL and GloRo train.

    results: records of runs with snapshots; means over the seeds. Rings: where a curve is first at
    95 % of its last value.
    """
    table = snapshot_table(results)
    figure, axes = _subplots((9, 2.9), 1, 3)
    measures = {
        "tightness": "tightness (%)",
        "cra": f"CRA at ε = {results[0]['epsilon']:g} (%)",
        "K_f": "K(f), guaranteed",
    }
    for ax, (column, label) in zip(axes, measures.items(), strict=True):
        for method, line in LINES.items():
            own = table[table["method"] == method]
            if own.empty:
                continue
            ax.plot(own["epoch"], own[column], label=method, **line)
            at = reached(own["epoch"], own[column])
            if column != "K_f" and np.isfinite(at):
                y = own[own["epoch"] == at][column]
                ax.plot(at, y, "o", ms=10, mfc="none", mec=line["color"])
        ax.set(xlabel="epoch", ylabel=label)
        if table["epoch"].max() > 30:
            ax.set_xscale("log")
        else:
            ax.xaxis.get_major_locator().set_params(integer=True)
    _log_y(axes[2])
    for ax in axes[:2]:
        ax.set_ylim(0)
    axes[1].legend(loc="best")
    rings = " · rings: first at 95 % of the last value"
    return _title(figure, caption(results, tightness=True) + rings)


@styled
def lambda_figure(images, moons):
    """Figure D4a: accuracies (left) and K(f) (right) over lambda, for images and for two moons.

    images, moons: result records of CLL with several lambda. The dashed line is the prediction
    K(f) proportional to lambda^(-1/2) through the middle of the measured values, the dotted one the
    fitted power law.
    """
    figure = Figure(figsize=(9, 5.4))
    for (accuracy, constant), results in zip(figure.subplots(2, 2), (images, moons), strict=True):
        if not results:
            for ax in (accuracy, constant):
                ax.text(0.5, 0.5, "not run", ha="center", transform=ax.transAxes)
                ax.set_axis_off()
            continue
        table = sweep_table(results)
        lam, K = table["lambda"], table["K_f"]
        clean = {"color": GREEN, "ls": "-.", "marker": "^", "ms": 4}
        accuracy.plot(lam, table["clean"], label="clean", **clean)
        margin = f"CRA({table['epsilon'].iloc[0]:g})"
        accuracy.plot(lam, table["cra"], label=margin, **LINES["CLL"])
        accuracy.set_ylim(0, 105)
        accuracy.set_ylabel(f"{results[0]['model']}, {data_source(results[0])}\naccuracy (%)")
        constant.plot(lam, K, label="measured", ls="", color=BLUE, marker="o", ms=5)
        if lam.nunique() > 1:
            middle = np.exp(np.log(K).mean() + 0.5 * np.log(lam).mean())
            label = "predicted: λ$^{-1/2}$"
            constant.plot(lam, middle * lam**-0.5, color="black", ls="--", label=label)
            exponent, factor = lambda_slope(table)
            label = f"fitted: λ$^{{{exponent:.2f}}}$".replace("-", "−")
            constant.plot(lam, factor * lam**exponent, color=ORANGE, ls=":", label=label)
        _log_y(constant)
        constant.set_ylabel("K(f), guaranteed")
        same = all(same_data(r, "CIFAR-10") for r in results)
        if same:
            row = published("table2").loc["T2-05"]
            mark = OPEN | {"marker": "o", "mec": BLUE, "ms": 7}
            constant.plot(1e-4, row["k_f"], label="paper (power iteration)", **mark)
            accuracy.plot(1e-4, row["clean"], **OPEN, marker="^", mec=GREEN, ms=7)
        for ax in (accuracy, constant):
            ax.set(xscale="log", xlabel="λ, weight of K²")
        accuracy.legend(loc="lower left", ncols=2)
        constant.legend(loc="upper right")
    return _title(figure, f"{caption(images)} · below: {caption(moons)}")
