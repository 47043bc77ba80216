"""What tests of the exhibits share: made-up records and radii, and how to read a figure."""

import matplotlib
import numpy as np
import pandas as pd

import cll
from paper.records import published


def radii(n=200, seed=0):
    generator = np.random.default_rng(seed)
    radius = generator.exponential(0.2, n)
    correct = generator.random(n) < 0.8
    return {"radius": radius, "radius_paper_style": 1.01 * radius, "correct": correct}


def line(ax, label):
    """The data of the only line whose label starts so, or of that with just this label."""
    lines = ax.get_lines()
    same = [item for item in lines if item.get_label() == label]
    (found,) = same or [item for item in lines if item.get_label().startswith(label)]
    return found.get_data()


def texts(figure):
    return " ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text)).replace("\n", " ")


def record(row="T2-05", seed=1, clean=0.776, **changes):
    """A result record as experiment.run writes it, of a run that reproduces a row of a table."""
    printed = published(f"table{row[1]}").loc[row]
    ours = printed["method"] == "CLL"
    K_f = 70.0 if ours else 7.4
    loss = {"SOC": "SOC", "CPL": "Hinge", "SLL": "AOL", "LBDN": "AOL"}
    sure = [printed[k] if ours and pd.notna(printed[k]) else 0.15 for k in ("epsilon", "p")]
    cra = {"36/255": 0.60, "72/255": 0.44, "108/255": 0.29, "0.15": 0.59}
    result = {
        "name": f"{row}-{printed['model']}-{printed['method']}",
        "row": row,
        "seed": seed,
        "profile": "paper",
        "params_hash": f"{seed:064x}",
        "model": printed["model"],
        "method": loss.get(printed["method"], printed["method"]),
        "data": printed["dataset"].lower().replace("r-", "r"),
        "parameters": 4_342_984,
        "epsilon": sure[0],
        "p": sure[1] if ours else None,
        "epochs": 801,
        "published_epochs": 801,
        "clean": clean,
        "cra": cra,
        "cra_paper_style": {k: v + 0.01 for k, v in cra.items()},
        "K_f": K_f,
        "K_f_paper_style": K_f / 1.01,
        "K_hf": 1 / cll.cll_scale(*sure) if ours else K_f,
        "tightness": 0.79,
        "tightness_paper_style": 0.79 * 1.01,
        "params": {"loss": {}, "tightness": None},
    }
    return result | changes


def moons_record(method="CLL", epsilon=0.15, p=0.01, cra=0.997, K=97.0, seed=1, **changes):
    result = record(seed=seed, row="T2-05" if method == "CLL" else "T2-03")
    result |= {"name": "moons", "row": None, "data": "two_moons", "model": "MLP", "K_f": K}
    result |= {"epsilon": epsilon, "p": p if method == "CLL" else None, "method": method}
    result |= {"epochs": 1000, "published_epochs": 1001, "train_cra": {f"{epsilon:g}": cra}}
    return result | changes


def tempered(t, cra=1.0, K=200.0, seed=1):
    params = {"loss": {"temperature": t}, "tightness": None}
    return moons_record(
        "GloRo", cra=cra, K=K * t, K_hf=K, seed=seed, params=params, train_clean=1.0
    )


def sweep_record(method="CLL", epsilon=0.15, p=0.3, lam=1e-4, cra=0.6, **changes):
    result = record("T2-05" if method == "CLL" else "T2-03", **changes)
    loss = {"lambda": lam} if method == "CLL" else {}
    result |= {"method": method, "epsilon": epsilon, "p": p if method == "CLL" else None}
    result |= {"cra": {f"{epsilon:g}": cra}, "params": {"loss": loss, "tightness": None}}
    if "K_hf" not in changes:
        result["K_hf"] = 1 / cll.cll_scale(epsilon, p) if method == "CLL" else result["K_f"]
    return result | changes


def snapshots(values):
    return [{"epoch": e, "clean": 0.7, "cra": {"0.15": v}, "K_f": 9.0, "tightness": v}
            for e, v in values.items()]  # fmt: skip


def ablated(usual=0.60, other=0.63, **changes):
    """Two seeds each of the usual choice and of another, on a row of table 2."""
    runs = []
    for offset, cra in (("two-sided", usual), ("one-sided", other)):
        for seed in (1, 2):
            loss = {"name": "CLL", "offset": offset, "detach": True}
            values = dict.fromkeys(("36/255", "72/255", "108/255"), cra + 0.01 * seed)
            own = {"cra": values, "row": "T2-05" if cra == usual else None}
            run = record(seed=seed, **own) if own["row"] else record(seed=seed) | own
            runs.append(run | {"params": {"loss": loss, "tightness": None}} | changes)
    return runs
