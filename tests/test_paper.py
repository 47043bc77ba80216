"""The published numbers agree with each other, and the tables put ours beside them honestly."""

import ast
import json
import math

import numpy as np
import pandas as pd
import pytest

import cll
from cll import paper


def record(row="T2-05", seed=1, clean=0.776, **changes):
    """A result record as experiment.run writes it, of a run that reproduces a row of table 2."""
    printed = paper.published("table2").loc[row]
    gloro = printed["method"] == "GloRo"
    K_f = 7.4 if gloro else 70.0
    cra = {"36/255": 0.60, "72/255": 0.44, "108/255": 0.29, "0.15": 0.59}
    result = {
        "name": f"cifar10-{printed['model']}-{printed['method']}",
        "row": row,
        "seed": seed,
        "profile": "paper",
        "model": printed["model"],
        "method": printed["method"],
        "data": "cifar10",
        "epsilon": 0.15,
        "p": None if gloro else 0.3,
        "epochs": 801,
        "published_epochs": 801,
        "clean": clean,
        "cra": cra,
        "cra_paper_style": {k: v + 0.01 for k, v in cra.items()},
        "K_f": K_f,
        "K_f_paper_style": K_f / 1.01,
        "K_hf": K_f if gloro else 1 / cll.cll_scale(0.15, 0.3),
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


def cells(frame, column, bound="guaranteed"):
    found = frame[(frame["column"] == column) & (frame["bound"] == bound)]
    assert len(found) == 1
    return found.iloc[0]


# ------------------------------------------------------------------------------ published numbers
@pytest.mark.parametrize("table", ["table1", "table2"])
def test_printed_K_hf_is_one_over_the_calibrated_scale(table):
    rows = paper.published(table).dropna(subset=["epsilon", "p"])
    assert len(rows) >= 3
    for _, row in rows.iterrows():
        assert round(1 / cll.cll_scale(row["epsilon"], row["p"]), 1) == row["k_hf"], row["row_id"]


def test_printed_K_hf_of_the_slack_panel():
    rows = paper.published("two_moons").query("status == 'printed'")
    assert len(rows) == 4
    for _, row in rows.iterrows():
        K_hf = 1 / cll.cll_scale(row["epsilon"], float(row["p_code"]))
        assert round(K_hf, 1) == float(row["k_hf_printed"])
        assert K_hf == pytest.approx(float(row["k_hf_recomputed"]), abs=6e-4)


# the row that each CLL row of the tables is compared with by its printed differences
BASELINES = {
    "T1-04": ["T1-02"], "T1-07": ["T1-05", "T1-06"], "T1-10": ["T1-09"], "T2-04": ["T2-02"],
    "T2-05": ["T2-03"], "T2-07": ["T2-06"], "T2-09": ["T2-08"], "T2-13": ["T2-12"],
    "T2-15": ["T2-14"], "T2-17": ["T2-16"],
}  # fmt: skip


@pytest.mark.parametrize("row_id", BASELINES)
def test_printed_differences_follow_from_printed_values(row_id):
    table = paper.published(f"table{row_id[1]}")
    row, baselines = table.loc[row_id], table.loc[BASELINES[row_id]]
    differences = {"clean": "d_clean", "cra_36": "d_36", "cra_72": "d_72", "cra_108": "d_108"}
    checked = 0
    for column, difference in differences.items():
        if pd.isna(row[difference]) or column in paper.uncertain(row):
            continue
        assert row[column] - baselines[column].max() == pytest.approx(row[difference], abs=0.051)
        checked += 1
    assert checked >= 2


def test_relative_gains_of_figure_5_follow_from_printed_values():
    table = paper.published("figure5").query("panel == 'eps_sweep_table'")
    for _, pair in table.groupby("epsilon"):
        gloro, ours = (pair[pair["method"] == m].iloc[0] for m in ("GloRo", "CLL"))
        low, high = ((ours["cra_at_eps"] + s * 0.05) / (gloro["cra_at_eps"] - s * 0.05) - 1
                     for s in (-1, 1))  # fmt: skip
        assert 100 * low - 0.05 <= ours["rel_gain_printed_pct"] <= 100 * high + 0.05


def test_uncertain_cells_are_read_from_their_notes():
    table = paper.published("table2")
    assert paper.uncertain(table.loc["T2-03"]) == {"k_f", "k_hf"}
    assert paper.uncertain(table.loc["T2-08"]) == {"k_f", "k_hf"}
    assert paper.uncertain(table.loc["T2-11"]) == {"epsilon", "p"}
    assert paper.uncertain(table.loc["T2-05"]) == set()
    assert paper.uncertain(paper.published("table1").loc["T1-07"]) == {"cra_36"}


def test_unknown_table_is_named():
    with pytest.raises(ValueError, match="no published table 'table3'; there are: figure5"):
        paper.published("table3")


# -------------------------------------------------------------------------------------- comparison
def test_mean_and_std_over_seeds():
    results = [record(seed=k, clean=c) for k, c in enumerate([0.770, 0.772, 0.777])]
    clean = cells(paper.comparison_table(results, rows=["T2-05"]), "clean")
    assert clean["n"] == 3
    assert clean["mean"] == pytest.approx(77.3)
    assert clean["std"] == pytest.approx(np.std([77.0, 77.2, 77.7], ddof=1))
    assert clean["difference"] == pytest.approx(77.3 - 77.6)


def test_one_seed_has_no_std():
    frame = paper.comparison_table([record()], rows=["T2-05"])
    assert frame["std"].isna().all()
    shown = paper.display_table(frame)
    assert not shown.map(lambda text: "±" in text).any(axis=None)
    assert shown.loc[("CIFAR-10", "4C3F", "CLL", "here, guaranteed"), "clean %"] == "77.6 (+0.0)"


def test_both_bounds_have_their_own_line():
    frame = paper.comparison_table([record()], rows=["T2-05"])
    assert cells(frame, "cra_36")["mean"] == pytest.approx(60)
    assert cells(frame, "cra_36", "paper-style")["mean"] == pytest.approx(61)
    assert cells(frame, "k_f", "paper-style")["mean"] == pytest.approx(70 / 1.01)
    assert cells(frame, "tightness", "paper-style")["mean"] == pytest.approx(79 * 1.01)
    assert cells(frame, "k_hf")["mean"] == pytest.approx(11.564, abs=1e-3)


def test_uncertain_cells_are_shown_but_never_compared():
    frame = paper.comparison_table([record("T2-03")], rows=["T2-03"])
    K_hf = cells(frame, "k_hf")
    assert K_hf["published"] == 7.4 and K_hf["uncertain"] and math.isnan(K_hf["difference"])
    assert not math.isnan(cells(frame, "cra_36")["difference"])
    shown = paper.display_table(frame)
    printed = shown.loc[("CIFAR-10", "4C3F", "GloRo", "paper")]
    assert printed["K(h∘f)"] == "7.4?" and printed["K(f)"] == "?"
    assert shown.loc[("CIFAR-10", "4C3F", "GloRo", "here, guaranteed"), "K(h∘f)"] == "7.4"


def test_rows_without_a_run_say_so():
    frame = paper.comparison_table([record("T2-05")], rows=["T2-04", "T2-05"])
    assert (frame[frame["row_id"] == "T2-04"]["n"] == 0).all()
    shown = paper.display_table(frame)
    assert (shown.loc[("CIFAR-10", "6C2F", "CLL", "here, guaranteed")] != "not run").sum() == 1
    assert shown.loc[("CIFAR-10", "6C2F", "CLL", "here, guaranteed"), "seeds"] == "0"
    assert "not run" not in set(shown.loc[("CIFAR-10", "4C3F", "CLL", "here, guaranteed")])


def test_tightness_that_was_not_measured_is_a_dash():
    result = {k: v for k, v in record().items() if not k.startswith("tightness")}
    shown = paper.display_table(paper.comparison_table([result], rows=["T2-05"]))
    assert shown.loc[("CIFAR-10", "4C3F", "CLL", "here, guaranteed"), "tightness %"] == "–"


def test_a_run_with_another_epsilon_is_not_the_published_row():
    frame = paper.comparison_table([record(epsilon=0.25)], rows=["T2-05"])
    assert (frame["n"] == 0).all()


@pytest.mark.parametrize(
    "data, comparable",
    [("cifar10", True), ("cifar10 (recovered)", True), ("CIFAR-10", True)]
    + [("digits", False), ("npz:mine", False), ("cifar100", False)],
)
def test_only_the_papers_data_are_compared(data, comparable):
    frame = paper.comparison_table([record(data=data)], rows=["T2-05"])
    assert frame["published"].notna().all()
    assert frame["difference"].notna().all() == comparable
    assert frame["difference"].isna().all() != comparable


def test_unknown_row_is_named():
    with pytest.raises(ValueError, match="no row 'T2-99' in table2"):
        paper.comparison_table([], rows=["T2-99"])


# ----------------------------------------------------------------------------- captions and tables
def test_caption_says_what_was_shortened_and_on_which_data():
    assert paper.caption([record()]) == "profile paper · data cifar10 · 1 seed · 801 epochs"
    quick = [record(profile="quick", epochs=6, seed=k) for k in (1, 2)]
    assert paper.caption(quick) == "profile quick · data cifar10 · 2 seeds · 6 of 801 epochs"
    digits = paper.caption([record(profile="smoke", data="digits", epochs=6)])
    assert "digits enlarged to 32x32, a mechanics check, not comparable with the paper" in digits
    assert paper.caption([moons_record()]).endswith("1000 epochs")
    assert paper.caption([]) == "no finished run"


def test_moons_table_finds_the_printed_value_of_each_slack():
    runs = [moons_record(p=0.75, cra=0.9), moons_record(p=1e-4, cra=0.999, seed=1)]
    runs += [moons_record(p=1e-4, cra=0.998, seed=2), moons_record("GloRo", cra=0.99, K=150.0)]
    table = paper.moons_table(runs)
    assert list(table["method"]) == ["CLL", "CLL", "GloRo"]
    assert list(table["n"]) == [1, 2, 1]
    assert list(table["cra_published"])[:2] == [90.2, 99.9]
    assert table["difference"][0] == pytest.approx(-0.2)
    assert math.isnan(table["cra_published"][2]) and table["K_hf"][2] == 150
    assert math.isnan(table["cra_std"][0])
    assert table["cra_std"][1] == pytest.approx(np.std([99.9, 99.8], ddof=1))
    shown = paper.display_moons(table)
    assert shown.loc[("CLL", "0.15", "0.75"), "CRA % (train)"] == "90.00 (-0.20)"


def test_annealed_slack_is_not_mistaken_for_a_printed_one():
    assert paper.moons_table([moons_record(p=1e-15)])["cra_published"].isna().all()


def test_verdicts_follow_the_numbers():
    runs = [moons_record(cra=0.9995, p=1e-15), moons_record("GloRo", cra=0.98)]
    verdicts = paper.claims("figure4", runs)["verdict"]
    assert list(verdicts[:3]) == ["shown"] * 3
    assert set(verdicts[3:]) == {"not run"}
    worse = [moons_record(cra=0.97, p=1e-15), moons_record("GloRo", cra=0.98)]
    assert list(paper.claims("true_margin", worse)["verdict"]) == [
        "not shown", "shown", "not shown"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no claims about 'figure9'"):
        paper.claims("figure9", [])


def test_slack_verdicts():
    found = {0.75: 0.9005, 0.25: 0.989, 0.01: 0.9985, 1e-4: 0.999}
    verdicts = paper.claims("slack_sweep", [moons_record(p=p, cra=c) for p, c in found.items()])
    assert len(verdicts) == 9 and set(verdicts["verdict"]) == {"shown"}
    verdicts = paper.claims("slack_sweep", [moons_record(p=0.25, cra=0.96)])
    assert verdicts.loc["p = 0.25: CRA within a point", "verdict"] == "not shown"


def test_digits_give_no_verdict_on_the_table():
    both = [record("T2-03"), record("T2-05", cra={"36/255": 0.7, "72/255": 0.5, "108/255": 0.3})]
    verdicts = paper.claims("table2", both)["verdict"]
    assert verdicts["4C3F: CLL has CRA at 36/255 above GloRo's"] == "shown"
    assert verdicts["6C2F: CLL has CRA at 36/255 above GloRo's"] == "not run"
    digits = [r | {"data": "digits"} for r in both]
    verdicts = paper.claims("table2", digits)["verdict"]
    assert verdicts["4C3F: CLL has CRA at 36/255 above GloRo's"] == "no verdict: digits"


def test_tables_are_saved_raw_and_readable(tmp_path):
    frame = paper.comparison_table([record()], rows=["T2-05"])
    shown = paper.display_table(frame)
    assert paper.save_table(frame, shown, tmp_path / "new" / "t", "caption | here") is shown
    back = pd.read_csv(tmp_path / "new" / "t.csv")
    assert back["mean"].to_numpy() == pytest.approx(frame["mean"].to_numpy())
    lines = (tmp_path / "new" / "t.md").read_text().splitlines()
    assert lines[-1] == "caption | here"
    assert {line.count("|") for line in lines[:5]} == {shown.shape[1] + shown.index.nlevels + 1}


def test_run_table_shows_both_bounds():
    table = paper.run_table(record())
    assert list(table.loc["CRA at 36/255, %"]) == ["60.0", "61.0"]
    assert list(table.loc["K(h∘f)"]) == ["11.56", "11.56"]


# --------------------------------------------------------------------------------------- notebooks
def test_train_notebook_takes_every_key_of_a_parameter_file():
    cells = json.loads((cll.ROOT / "notebooks" / "train.ipynb").read_text())["cells"]
    (source,) = [c["source"] for c in cells if "parameters" in c["metadata"].get("tags", [])]
    declared = {node.targets[0].id for node in ast.parse("".join(source)).body}
    assert declared == set(cll.experiment.Params.model_fields) | {
        "params_file", "profiles", "outputs"
    }  # fmt: skip


def test_a_short_tightness_search_is_named():
    search = {"method": "optimized", "pairs": 4000, "steps": 1000}
    assert paper.tightness_note([{"params": {"tightness": search}}]) == ""
    assert paper.tightness_note([{"params": {"tightness": None}}]) == ""
    note = paper.tightness_note([{"params": {"tightness": search | {"pairs": 128, "steps": 50}}}])
    assert "128 pairs x 50 steps" in note


def test_gloro_with_the_exact_gradient_has_lines_of_its_own():
    exact = moons_record("GloRo", cra=0.999, params={"loss": {"gradient": "exact"}})
    table = paper.moons_table([moons_record("GloRo", cra=0.9), exact])
    assert dict(zip(table["method"], table["cra"], strict=True)) == pytest.approx(
        {"GloRo": 90.0, "GloRo, exact gradient": 99.9}
    )
