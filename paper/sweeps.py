"""Figures 5 (slack, margin), D4a (lambda), D1 (convergence): runs, tables, pictures, claims."""

import functools
import itertools
import operator

import numpy as np
import pandas as pd

from cll.experiment.schema import experiment_params, load_runs, sized_as
from cll.losses import cll_scale

from . import records, style
from .records import TRUE_MARGIN, Test, cell_text, or_dash, published, same_data
from .style import BLUE, GREEN, ORANGE, RED

CURVES = {  # of the methods that figures 5 and D1 compare
    "CLL": {"color": BLUE, "ls": "-", "marker": "o", "ms": 4},
    "GloRo": {"color": ORANGE, "ls": "--", "marker": "s", "ms": 4},
    "GloRo, exact gradient": {"color": RED, "ls": ":", "marker": "v", "ms": 4},
}
CLEAN = {"color": GREEN, "ls": "-.", "marker": "^", "ms": 4}  # clean accuracy, beside CRA
RIVALS = {"GloRo": "", "GloRo, exact gradient": "-exact"}  # of CLL, and how its tests name them
OPEN = {"ls": "", "mfc": "white", "zorder": 3, "clip_on": False}  # the paper's values


# runs of other experiments that belong to a sweep as well; where they are finished they are read
SHARED = {"figure5": "table2/CLL table2/GloRo ablation/GloRo-exact", "lambda_sweep": "table2/CLL"}
SHARED["front"] = "table2/CLL figure5/CLL-p0.05 figure5/CLL-p0.6 figure5/CLL-eps0.25 "
SHARED["front"] += "figure5/GloRo-exact-eps0.25 ablation/GloRo-exact"


def runs(exhibit, profile, seeds=None, **overrides):
    """The image runs of params/<exhibit>/ and those SHARED with it. exhibit: "figure5", "front",
    "lambda_sweep" or "convergence". seeds: None takes the profile's. overrides: of parameters."""
    sweep = experiment_params(exhibit, profile, seeds, **overrides)
    seeds = sorted({run.seed for run in sweep})
    names = SHARED.get(exhibit, "").replace("/", "/cifar10-4C3F-").split()
    shared = [load_runs(f"params/{name}.yaml", profile, seeds, **overrides) for name in names]
    return sweep + sized_as(sweep, sum(shared, []))


def lambda_runs(profile, seeds=None, data="", label="", **overrides):
    """(images, two moons) over lambda; two moons with the slack sweep's runs at the same slack.
    seeds: None takes those of the images' profile. data, label: of the images."""
    images = runs("lambda_sweep", profile, seeds, data=data, label=label, **overrides)
    moons = records.runs_beside(images, "lambda_moons", profile, **overrides)
    slack = records.runs_beside(images, "slack_sweep", profile, **overrides)
    return images, moons + [run for run in slack if run.loss.p == moons[0].loss.p]


def sweep_table(results):
    """Runs by method, epsilon, p and lambda (nan where the loss has none), a line each: n (seeds)
    and means over the seeds, guaranteed bound, test samples. clean, cra (at the training margin)
    and tightness are in percent; cra_published is what figure 5 prints for that run, difference
    from it nan on other data than CIFAR-10."""
    by = records.BY_MARGIN | {"lambda": lambda r: r["params"]["loss"].get("lambda")}
    values = {"clean": lambda r: 100 * r["clean"]} | records.CONSTANTS
    values |= {"cra": lambda r: 100 * r["cra"][f"{r['epsilon']:g}"]}
    printed = published("figure5").dropna(subset=["cra_at_eps"])
    lines = records.summary(results, by, values)
    for line in lines:
        row = printed[printed["method"].eq(line["method"]) & printed["epsilon"].eq(line["epsilon"])]
        for key in ("p", "lambda") if line["method"] == "CLL" else ():
            row = row[np.isclose(row[key], line[key])]
        known = len(row) and line["runs"][0]["data"] != "two_moons"
        line["cra_published"] = row["cra_at_eps"].iloc[0] if known else np.nan
        if all(same_data(r, "CIFAR-10") for r in line["runs"]):
            line["difference"] = line["cra"] - line["cra_published"]
        tightness = [r["tightness"] for r in line["runs"] if r.get("tightness") is not None]
        line["tightness"] = 100 * np.mean(tightness) if tightness else np.nan
    names = ["method", "epsilon", "p", "lambda", "n", "clean", "cra", "K_f", "K_hf", "tightness"]
    names += ["clean_std", "cra_std", "cra_published", "difference"]
    table = pd.DataFrame(lines, columns=names)
    table = table.astype(dict.fromkeys(names[1:4] + names[5:], float))
    return table.sort_values(names[:4], ignore_index=True)


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
    """The table of figure 5 from the frame of `sweep_table`: CRA(epsilon) of CURVES at each printed
    margin and CLL's relative gain on its RIVALS, in percent, ours and printed; nan: not run."""
    printed = published("figure5").query("panel == 'eps_sweep_table'")
    printed = printed.set_index(["method", "epsilon"])["cra_at_eps"]
    gains = pd.DataFrame(index=printed["CLL"].index)
    ours = over_margin(table)["cra"].unstack("method").reindex(columns=[*CURVES])
    for end, cra in (("", ours), ("_published", printed.unstack("method"))):
        gains = gains.join(cra.add_suffix(end))
        for rival in cra.columns.intersection([*RIVALS]):
            base = gains[rival + end].replace(0, np.nan)
            gains[f"gain{RIVALS[rival]}{end}"] = 100 * (gains["CLL" + end] / base - 1)
    return gains.reset_index()


def over_margin(table):
    """The lines of `sweep_table` over the margin, CLL's at p = 0.3, by method and epsilon."""
    return table[table["p"].isna() | np.isclose(table["p"], 0.3)].set_index(["method", "epsilon"])


def display_gains(gains):
    """The frame of `gain_table` for reading, laid out as in the paper: a column per margin."""
    rows = {"CLL": "CLL, CRA(ε) %"}
    for rival, kind in RIVALS.items():
        rows |= {rival: f"{rival}, CRA(ε) %", f"gain{kind}": f"CLL's relative gain on {rival}, %"}
    lines = {}
    for name, heading in rows.items():
        form = "+.1f" if "gain" in name else ".1f"
        for where, end in (("here", ""), ("paper", "_published")):
            if name + end in gains:
                lines[heading, where] = [or_dash(form, value) for value in gains[name + end]]
    index = pd.MultiIndex.from_tuples(lines, names=["", "source"])
    return pd.DataFrame(lines.values(), index, [f"ε = {epsilon:g}" for epsilon in gains["epsilon"]])


def snapshot_table(results):
    """Runs with snapshots, a line per method and epoch: means over the seeds of clean, cra (at the
    training margin) and tightness in percent, and K_f; guaranteed bound, test samples."""
    lines = []
    for r in results:
        for s in r.get("snapshots", []):
            shares = s["clean"], s["cra"][f"{r['epsilon']:g}"], s.get("tightness", np.nan)
            lines.append([r["method"], s["epoch"], *(100 * share for share in shares), s["K_f"]])
    names = ["method", "epoch", "clean", "cra", "tightness", "K_f"]
    return pd.DataFrame(lines, columns=names).groupby(["method", "epoch"], as_index=False).mean()


def reached(epochs, values, share=0.95):
    """The first epoch at which values (in order of epochs) are at `share` of their last one."""
    values = [*values]
    there = (e for e, v in zip(epochs, values, strict=True) if v >= share * values[-1])
    return float(next(there, np.nan))


def front(clean, cra):
    """The points that no other beats in both accuracies, in order of the first: two arrays."""
    order = np.lexsort((-np.asarray(cra), -np.asarray(clean)))
    clean, cra = np.asarray(clean)[order], np.asarray(cra)[order]
    kept = cra > np.maximum.accumulate([-np.inf, *cra[:-1]])
    return clean[kept][::-1], cra[kept][::-1]


def compare_fronts(ours, rival):
    """Where our front lies above another, in words, by tenths of a point: at each clean accuracy
    that both reach, the most CRA with at least that much, on straight lines between the points."""
    clean = np.linspace(min(ours[0][0], rival[0][0]), min(ours[0][-1], rival[0][-1]), 201)
    gain = np.round(np.interp(clean, *ours) - np.interp(clean, *rival), 1)
    parts = []
    for sign, span in itertools.groupby(range(len(clean)), lambda i: np.sign(gain[i])):
        span = [*span]
        by = f" (by up to {np.abs(gain[span]).max():.1f})" * bool(sign)
        where = {1: "above", -1: "below", 0: "level"}[sign]
        parts.append(f"{where} from {clean[span[0]]:.1f} to {clean[span[-1]]:.1f}{by}")
    return ", ".join(parts)


@style.of_runs
def figure5(results):
    """Figure 5. Means over the seeds; what is missing leaves a gap. Open marks: as printed."""
    table = sweep_table(results)
    same = all(same_data(r, "CIFAR-10") for r in results)
    figure, axes = style.subplots((10, 3.1), 1, 4)
    slack = table[(table["method"] == "CLL") & np.isclose(table["epsilon"], TRUE_MARGIN)]
    accuracies(axes[0], slack.sort_values("p"), "p", "CRA(0.15)")
    _margin_curves(axes, table, published("figure5").query("panel == 'eps_sweep_table' and @same"))
    style.log_scale(axes[2])
    titles = ["slack, CLL at ε = 0.15", "certified accuracy", "K", "tightness"]
    names = ["accuracy (%)", "CRA at the trained ε (%)", "$K^{(f)}$", "tightness (%)"]
    for ax, title, name in zip(axes, titles, names, strict=True):
        ax.set(title=title, ylabel=name, xlabel="training margin ε", xlim=(0, 1.4))
        ax.margins(y=0.5)  # room for the legend
        if ax is not axes[2]:
            ax.set_ylim(0)
        ax.legend(loc="best", labelspacing=0.2, handlelength=2.4)
    axes[0].set(xlabel="slack p", xlim=(0, 0.75))
    marks = " · open marks: the paper's values" * same
    return style.titled(figure, records.caption(results, tightness=True) + marks)


def _margin_curves(axes, table, printed):
    """The curves of figure 5 over the margin, and what is printed of them: rings and smaller
    squares, so that neither hides the other."""
    sweep = over_margin(table).sort_values("epsilon").reset_index()
    columns = ("cra", "cra_at_eps"), ("K_f", "k_f"), ("tightness", "tightness")
    for method, curve in CURVES.items():
        ours, paper = (frame[frame["method"] == method] for frame in (sweep, printed))
        if not len(ours) + len(paper):
            continue
        mark = OPEN | {"marker": curve["marker"], "mec": curve["color"], "mfc": "none"}
        mark["ms"] = 8 if method == "CLL" else 5
        for ax, (column, as_printed) in zip(axes[1:], columns, strict=True):
            label = method if column != "K_f" else None  # as in the panels beside it
            ax.plot(ours["epsilon"], ours[column], label=label, **curve)
            if len(paper):
                ax.plot(paper["epsilon"], paper[as_printed], **mark)
        if method == "CLL":
            at = np.linspace(0.13, 1.3, 100)
            law = [1 / float(cll_scale(float(e), 0.3)) for e in at]
            axes[2].plot(at, law, color=BLUE, ls=":", label="CLL, $K^{(h∘f)}$")
        paper = paper.dropna(subset=["clean", "p"])  # at the margin of the left panel, with slack
        axes[0].plot(paper["p"], paper["clean"], **OPEN, marker="^", mec=GREEN, ms=6)
        axes[0].plot(paper["p"], paper["cra_at_eps"], **mark)


def accuracies(ax, table, over, margin):
    """Clean accuracy and CRA of CLL over a column of `sweep_table`."""
    ax.plot(table[over], table["clean"], label="clean", **CLEAN)
    ax.plot(table[over], table["cra"], label=margin, **CURVES["CLL"])


@style.of_runs
def convergence_figure(results):
    """Figure D1: tightness, CRA and K while CLL and GloRo train, of runs with snapshots."""
    table = snapshot_table(results)
    figure, axes = style.subplots((9, 2.9), 1, 3)
    margin = f"CRA at ε = {results[0]['epsilon']:g} (%)"
    measures = {"tightness": "tightness (%)", "cra": margin, "K_f": "K(f), guaranteed"}
    for ax, (column, label) in zip(axes, measures.items(), strict=True):
        for method, curve in CURVES.items():
            if len(run := table[table["method"] == method]):
                ax.plot(run["epoch"], run[column], label=method, **curve)
        ax.set(xlabel="epoch", ylabel=label)
        if table["epoch"].max() > 30:
            ax.set_xscale("log")
        else:
            ax.xaxis.get_major_locator().set_params(integer=True)
    style.log_scale(axes[2])
    for ax in axes[:2]:
        ax.set_ylim(0)
    axes[1].legend(loc="best")
    return style.titled(figure, records.caption(results, tightness=True))


@style.styled
def lambda_figure(images, moons):
    """Figure D4a: accuracies (left) and K(f) (right) of CLL over lambda, for images and for two
    moons. The line predicted, lambda^(-1/2), goes through the middle of the measured values."""
    figure, axes = style.subplots((9, 5.4), 2, 2)
    for (accuracy, constant), results in zip(axes, (images, moons), strict=True):
        if not results:
            for ax in (accuracy, constant):
                ax.text(0.5, 0.5, "not run", ha="center", transform=ax.transAxes)
                ax.set_axis_off()
            continue
        table = sweep_table(results)
        accuracies(accuracy, table, "lambda", f"CRA({table['epsilon'].iloc[0]:g})")
        shown = f"{results[0]['model']}, {records.data_source(results[0])}"
        accuracy.set(ylim=(0, 105), ylabel=f"{shown}\naccuracy (%)")
        _power_law(constant, table["lambda"], table["K_f"])
        style.log_scale(constant)
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


def _power_law(ax, lam, K):
    """K(f) over lambda: measured, predicted and fitted."""
    ax.plot(lam, K, label="measured", ls="", color=BLUE, marker="o", ms=5)
    if lam.nunique() > 1:
        middle = np.exp(np.log(K).mean() + 0.5 * np.log(lam).mean())
        ax.plot(lam, middle * lam**-0.5, color="black", ls="--", label="predicted: λ$^{-1/2}$")
        exponent, factor = records.power_law(lam, K)
        label = f"fitted: λ$^{{{exponent:.2f}}}$".replace("-", "−")
        ax.plot(lam, factor * lam**exponent, color=ORANGE, ls=":", label=label)


def figure5_claims(results):
    table = sweep_table(results or [])
    gains = gain_table(table)
    if results is None:  # the printed numbers are judged
        gains[["GloRo", "CLL"]] = gains[["GloRo_published", "CLL_published"]]
    grid = published("figure5").query("panel == 'slack_sweep_4C3F_left'")["p"]
    slack = table[(table["method"] == "CLL") & np.isclose(table["epsilon"], 0.15)]
    slack = slack.groupby(slack["p"].round(4))[["clean", "cra"]].mean().reindex(grid)
    form = ", ".join(["{:.1f}"] * len(grid))
    yield Test("slack-clean", form, slack["clean"].to_numpy(), lambda *c: c[-1] < c[0])
    yield Test("slack-cra", form, slack["cra"].to_numpy(), lambda *c: max(c) > c[0])

    printed = ", ".join(f"{gain:+.1f}" for gain in gains["gain_published"])
    form = ", ".join(["{:.1f} vs {:.1f}"] * len(gains))
    more, above = (functools.partial(records.shows, by) for by in ("three percent above", "above"))
    for rival, kind in RIVALS.items():
        pairs = gains[["CLL", rival]].to_numpy().ravel()
        yield Test(f"gain{kind}", form, pairs, more, printed * (not kind))
        keys = [(method, epsilon) for epsilon in gains["epsilon"] for method in ("CLL", rival)]
        pairs = over_margin(table).reindex(keys)
        for column in ("K_f", "K_hf", "tightness"):
            yield Test(column + kind, form, pairs[column].to_numpy(), above)


def convergence_claims(results):
    table = snapshot_table(results)
    for column in ("cra", "tightness"):
        runs = [table[table["method"] == method] for method in ("CLL", "GloRo")]
        epochs = [reached(run["epoch"], run[column]) for run in runs]
        yield Test(column, "epoch {:.0f} vs {:.0f}", epochs, operator.lt)


def lambda_claims(results):
    table = sweep_table(results)
    table = table if len(table) > 2 else table[:0]
    lam, K = table["lambda"].to_numpy(), table["K_f"].to_numpy()
    yield Test("any-K", "{:.1f} to {:.1f}", K[[0, -1]] if len(K) else [np.nan], operator.gt)
    yield Test("law", "{:.2f}", [records.power_law(lam, K)[0]], lambda b: abs(b + 0.5) <= 0.1)
    decades = 0.0 if len(K) else np.nan
    for i, j in itertools.combinations(range(len(K)), 2):
        if np.ptp(table.loc[i:j, ["clean", "cra"]], axis=0).max() <= 1:
            decades = max(decades, np.log10(lam[j] / lam[i]))
    yield Test("flat", "{:.1f} decades", [decades], lambda d: d >= 1.99)
