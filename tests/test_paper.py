"""The published numbers agree with each other, and the tables put ours beside them honestly."""

import ast
import json
import math

import numpy as np
import pandas as pd
import pytest

import cll
import paper.claims
from paper.ablation import ablation_table, display_ablation
from paper.choose import display_temperature, temperature_table
from paper.claims import CHECKLIST, checklist, read_claims
from paper.formulas import _printed_constants
from paper.moons import display_moons, moons_table
from paper.own import run_table
from paper.records import (
    COLUMNS,
    RADII,
    RELATIONS,
    caption,
    published,
    save_table,
    tightness_note,
    uncertain,
)
from paper.sweeps import display_gains, gain_table, lambda_slope, reached, sweep_table
from paper.tables import (
    PAIRS,
    attack_check,
    attack_table,
    comparison_table,
    display_attacks,
    display_table,
    seed_table,
    table_runs,
)


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


def cells(frame, column, bound="guaranteed"):
    found = frame[(frame["column"] == column) & (frame["bound"] == bound)]
    assert len(found) == 1
    return found.iloc[0]


# ------------------------------------------------------------------------------ published numbers
@pytest.mark.parametrize("table", ["table1", "table2"])
def test_printed_K_hf_is_one_over_the_calibrated_scale(table):
    rows = published(table).dropna(subset=["epsilon", "p"])
    assert len(rows) >= 3
    for _, row in rows.iterrows():
        assert round(1 / cll.cll_scale(row["epsilon"], row["p"]), 1) == row["k_hf"], row["row_id"]


def test_printed_K_hf_of_the_slack_panel():
    rows = published("two_moons").query("status == 'printed'")
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
    table = published(f"table{row_id[1]}")
    row, baselines = table.loc[row_id], table.loc[BASELINES[row_id]]
    differences = {"clean": "d_clean", "cra_36": "d_36", "cra_72": "d_72", "cra_108": "d_108"}
    checked = 0
    for column, difference in differences.items():
        if pd.isna(row[difference]) or column in uncertain(row):
            continue
        assert row[column] - baselines[column].max() == pytest.approx(row[difference], abs=0.051)
        checked += 1
    assert checked >= 2


def test_relative_gains_of_figure_5_follow_from_printed_values():
    table = published("figure5").query("panel == 'eps_sweep_table'")
    for _, pair in table.groupby("epsilon"):
        gloro, ours = (pair[pair["method"] == m].iloc[0] for m in ("GloRo", "CLL"))
        low, high = ((ours["cra_at_eps"] + s * 0.05) / (gloro["cra_at_eps"] - s * 0.05) - 1
                     for s in (-1, 1))  # fmt: skip
        assert 100 * low - 0.05 <= ours["rel_gain_printed_pct"] <= 100 * high + 0.05


def test_uncertain_cells_are_read_from_their_notes():
    table = published("table2")
    assert uncertain(table.loc["T2-03"]) == {"k_f", "k_hf"}
    assert uncertain(table.loc["T2-08"]) == {"k_f", "k_hf"}
    assert uncertain(table.loc["T2-11"]) == {"epsilon", "p"}
    assert uncertain(table.loc["T2-05"]) == set()
    assert uncertain(published("table1").loc["T1-07"]) == {"cra_36"}


def test_what_is_said_of_the_tables_is_about_their_rows_and_columns():
    said = published("table_claims")
    assert said["claim"].is_unique and set(said["relation"]) == set(RELATIONS)
    for claim in said.to_dict("records"):
        rows = {claim["row_id"], *claim["rivals"].split()}
        assert rows <= set(published(claim["table"]).index)
        assert set(claim["columns"].split()) <= set(COLUMNS)


def test_unknown_table_is_named():
    with pytest.raises(ValueError, match="no published table 'table3'; there are: figure5"):
        published("table3")


# -------------------------------------------------------------------------------------- comparison
def test_mean_and_std_over_seeds():
    results = [record(seed=k, clean=c) for k, c in enumerate([0.770, 0.772, 0.777])]
    clean = cells(comparison_table(results, rows=["T2-05"]), "clean")
    assert clean["n"] == 3
    assert clean["mean"] == pytest.approx(77.3)
    assert clean["std"] == pytest.approx(np.std([77.0, 77.2, 77.7], ddof=1))
    assert clean["difference"] == pytest.approx(77.3 - 77.6)


def test_seed_table_has_the_rows_that_were_run():
    runs = [record(seed=k, clean=c) for k, c in ((1, 0.77), (2, 0.78), (3, 0.82))]
    table = seed_table(comparison_table(runs))
    assert list(table.index) == ["T2-05"] and table.loc["T2-05", "n"] == 3
    std = np.std([77, 78, 82], ddof=1)
    assert table.loc["T2-05", "clean %"] == f"79.00 ± {std:.2f}"
    assert seed_table(comparison_table([])).empty


def test_one_seed_has_no_std():
    frame = comparison_table([record()], rows=["T2-05"])
    assert frame["std"].isna().all()
    shown = display_table(frame)
    assert not shown.map(lambda text: "±" in text).any(axis=None)
    assert (
        shown.loc[("T2-05", "CIFAR-10", "4C3F", "CLL", "here, guaranteed"), "clean %"]
        == "77.6 (+0.0)"
    )


def test_both_bounds_have_their_own_line():
    frame = comparison_table([record()], rows=["T2-05"])
    assert cells(frame, "cra_36")["mean"] == pytest.approx(60)
    assert cells(frame, "cra_36", "paper-style")["mean"] == pytest.approx(61)
    assert cells(frame, "k_f", "paper-style")["mean"] == pytest.approx(70 / 1.01)
    assert cells(frame, "tightness", "paper-style")["mean"] == pytest.approx(79 * 1.01)
    assert cells(frame, "k_hf")["mean"] == pytest.approx(11.564, abs=1e-3)


def test_uncertain_cells_are_shown_but_never_compared():
    frame = comparison_table([record("T2-03")], rows=["T2-03"])
    K_hf = cells(frame, "k_hf")
    assert K_hf["published"] == 7.4 and K_hf["uncertain"] and math.isnan(K_hf["difference"])
    assert not math.isnan(cells(frame, "cra_36")["difference"])
    shown = display_table(frame)
    printed = shown.loc[("T2-03", "CIFAR-10", "4C3F", "GloRo", "paper")]
    assert printed["K(h∘f)"] == "7.4?" and printed["K(f)"] == "?"
    assert shown.loc[("T2-03", "CIFAR-10", "4C3F", "GloRo", "here, guaranteed"), "K(h∘f)"] == "7.4"


def test_rows_without_a_run_say_so():
    frame = comparison_table([record("T2-05")], rows=["T2-04", "T2-05"])
    assert (frame[frame["row_id"] == "T2-04"]["n"] == 0).all()
    shown = display_table(frame)
    missing = shown.loc[("T2-04", "CIFAR-10", "6C2F", "CLL", "here")]
    assert missing["seeds"] == "0" and set(missing.drop("seeds")) == {"not run"}
    assert "not run" not in set(shown.loc[("T2-05", "CIFAR-10", "4C3F", "CLL", "here, guaranteed")])


@pytest.mark.parametrize(("table", "rows"), [("table1", 10), ("table2", 17)])
def test_whole_tables_have_every_row_in_the_papers_order(table, rows):
    results = [record(f"T{table[-1]}-05")]
    shown = display_table(comparison_table(results, table)).reset_index()
    order = list(shown["row"].drop_duplicates())
    assert order == [f"T{table[-1]}-{i:02d}" for i in range(1, rows + 1)]
    for row_id, lines in shown.groupby("row"):
        ran = row_id == results[0]["row"]
        assert len(lines) == (3 if ran else 2)
        assert (lines["clean %"] == "not run").sum() == (not ran)
    assert not (shown == "").drop(columns="seeds").any(axis=None), "no blanks"


def test_literature_rows_and_the_authors_own_are_told_apart():
    shown = display_table(comparison_table([], "table1")).reset_index()
    origin = shown[shown["source"] != "here"].set_index("row")["source"]
    assert origin["T1-01"] == origin["T1-08"] == origin["T1-09"] == "paper (literature)"
    assert origin["T1-02"] == origin["T1-04"] == "paper"


def test_local_bounds_have_a_fourth_line_where_they_were_computed():
    local = {"36/255": 0.62, "72/255": 0.47, "108/255": 0.33, "0.15": 0.61}
    frame = comparison_table([record(cra_local=local)], rows=["T2-05", "T2-04"])
    assert cells(frame[frame["row_id"] == "T2-05"], "cra_72", "local bounds")["mean"] == 47
    assert "local bounds" not in set(frame[frame["row_id"] == "T2-04"]["bound"])
    shown = display_table(frame)
    line = shown.loc[("T2-05", "CIFAR-10", "4C3F", "CLL", "here, local bounds (guaranteed)")]
    assert line["CRA 108/255 %"] == "33.0 (+3.9)" and line["clean %"] == "77.6 (+0.0)"
    assert line["K(f)"] == line["tightness %"] == "–"


def test_K_hf_of_the_paper_style_bound_keeps_its_temperature():
    """AOL's temperature 1/4 makes K(h o f) four times K(f), whichever bound K(f) comes from."""
    aol = record("T2-16", K_f=1.5, K_f_paper_style=1.4, K_hf=6.0)
    frame = comparison_table([aol], rows=["T2-16"])
    assert cells(frame, "k_hf")["mean"] == pytest.approx(6.0)
    assert cells(frame, "k_hf", "paper-style")["mean"] == pytest.approx(5.6)
    assert cells(frame, "k_hf")["difference"] == pytest.approx(0)


def test_tightness_that_was_not_measured_is_a_dash():
    result = {k: v for k, v in record().items() if not k.startswith("tightness")}
    shown = display_table(comparison_table([result], rows=["T2-05"]))
    assert shown.loc[("T2-05", "CIFAR-10", "4C3F", "CLL", "here, guaranteed"), "tightness %"] == "–"


def test_a_run_with_another_epsilon_is_not_the_published_row():
    frame = comparison_table([record(epsilon=0.25)], rows=["T2-05"])
    assert (frame["n"] == 0).all()


@pytest.mark.parametrize(
    "data, comparable",
    [("cifar10", True), ("cifar10 (recovered)", True), ("CIFAR-10", True)]
    + [("digits", False), ("npz:mine", False), ("cifar100", False)],
)
def test_only_the_papers_data_are_compared(data, comparable):
    frame = comparison_table([record(data=data)], rows=["T2-05"])
    assert frame["published"].notna().all()
    assert frame["difference"].notna().all() == comparable
    assert frame["difference"].isna().all() != comparable


def test_a_part_of_the_classes_is_another_task():
    mini = record("T1-04", data="tiny-imagenet", num_classes=20)
    frame = comparison_table([mini], "table1", rows=["T1-04"])
    assert frame["n"].eq(1).all() and frame["difference"].isna().all()
    whole = record("T1-04", data="tiny-imagenet", num_classes=200)
    assert comparison_table([whole], "table1", rows=["T1-04"])["difference"].notna().any()
    assert "data tiny-imagenet (20 of 200 classes) ·" in caption([mini])
    assert "classes" not in caption([whole])


def test_unknown_row_is_named():
    with pytest.raises(ValueError, match="no row 'T2-99' in table2"):
        comparison_table([], rows=["T2-99"])
    with pytest.raises(ValueError, match="no row 'T2-99' in table2; it has: T2-01, "):
        table_runs("table2", [], "T2-05, T2-99")


def test_runs_of_a_table_come_in_the_papers_order():
    runs = cll.experiment.experiment_params("table2", "smoke", seeds=[2, 1])
    ordered = table_runs("table2", runs)
    assert [run.row for run in ordered] == sorted(run.row for run in runs)
    assert [run.seed for run in ordered[:4]] == [2, 1, 2, 1]
    chosen = table_runs("table2", runs, "T2-05,T2-03")
    assert [run.row for run in chosen] == ["T2-03", "T2-03", "T2-05", "T2-05"]


def test_data_of_ones_own_replace_the_data_set_that_the_label_names():
    runs = cll.experiment.experiment_params("table2", "quick")
    source = {"data": "npz:x.npz", "label": "cifar10 (recovered)"}
    for run in table_runs("table2", runs, **source):
        cifar10 = published("table2").loc[run.row, "dataset"] == "CIFAR-10"
        assert (run.data, run.label) == (
            ("npz:x.npz", source["label"]) if cifar10 else (run.data, "")
        )
    for run in table_runs("table2", runs, data="npz:x.npz", label="my images"):
        assert (run.data, run.label) == ("npz:x.npz", "my images")


# ----------------------------------------------------------------------------------------- attacks
def attacked(accuracy=(0.7, 0.6), cra=(0.65, 0.45), clean=0.8, local=None, **changes):
    radii = ("36/255", "72/255")
    attack = {"images": 20, "version": "apgd", "method": "AutoAttack apgd-ce, apgd-t"}
    attack |= {"clean": clean, "cra": dict(zip(radii, cra, strict=True)), "broken": 0}
    attack |= {"accuracy": dict(zip(radii, accuracy, strict=True))}
    if local:
        attack["cra_local"] = dict(zip(radii, local, strict=True))
    return attack | changes


def test_attacked_runs_stand_beside_those_that_were_not():
    results = [record("T2-05", attack=attacked(local=(0.65, 0.5))), record("T2-03")]
    table = attack_table(results)
    assert list(table["images"]) == [20, 20, 0] and list(table["certified"]) == [13, 10, 0]
    shown = display_attacks(table)
    ours = shown.loc[("T2-05", "cifar10", "4C3F", "CLL")]
    assert ours["CRA ≤ attacked at 36/255, %"] == "65.0 ≤ 65.0 ≤ 70.0"
    assert ours["CRA ≤ attacked at 72/255, %"] == "45.0 ≤ 50.0 ≤ 60.0"
    assert ours["clean %"] == "80.0" and ours["images"] == "20" and ours["seeds"] == "1"
    other = shown.loc[("T2-03", "cifar10", "4C3F", "GloRo")]
    assert set(other.drop("seeds")) == {"not run"} and other["seeds"] == "0"
    assert attack_check(table) == (
        "no certified image broken: 23 certificates of 1 run attacked "
        "(AutoAttack apgd-ce, apgd-t); CRA ≤ accuracy under attack ≤ clean everywhere"
    )


def test_seeds_are_averaged_and_counted():
    results = [record(seed=1, attack=attacked()), record(seed=2, attack=attacked((0.75, 0.7)))]
    table = attack_table(results)
    (line,) = display_attacks(table).to_dict("records")
    assert line["CRA ≤ attacked at 72/255, %"] == "45.0 ≤ 65.0" and line["seeds"] == "2"
    assert "44 certificates of 2 runs" in attack_check(table)


def test_a_broken_certificate_or_order_is_not_passed_over():
    def check(**changes):
        return attack_check(attack_table([record(attack=attacked(**changes))]))

    assert check(broken=1).startswith("1 CERTIFIED IMAGES BROKEN")
    assert check(accuracy=(0.7, 0.4)).endswith("clean NOT in 1 places")
    assert check(clean=0.65).endswith("clean NOT in 1 places")
    assert check(local=(0.71, 0.61)).endswith("clean NOT in 2 places")
    assert attack_check(attack_table([record()])).startswith("no run was attacked")


# ----------------------------------------------------------------------------- captions and tables
def test_caption_says_what_was_shortened_and_on_which_data():
    assert caption([record()]) == "profile paper · data cifar10 · 1 seed · 801 epochs"
    quick = [record(profile="quick", epochs=6, seed=k) for k in (1, 2)]
    assert caption(quick) == "profile quick · data cifar10 · 2 seeds · 6 of 801 epochs"
    digits = caption([record(profile="smoke", data="digits", epochs=6)])
    assert "digits enlarged to 32x32, a mechanics check, not comparable with the paper" in digits
    assert caption([moons_record()]).endswith("1000 epochs")
    assert caption([]) == "no finished run"


def test_caption_of_many_rows_is_one_line_of_ranges():
    rows = [
        record("T2-05", profile="quick", epochs=7, seed=1),
        record("T2-05", profile="quick", epochs=7, seed=2),
        record("T2-08", profile="quick", epochs=9, published_epochs=200),
    ]
    assert caption(rows) == (
        "profile quick · data cifar10 · 1 to 2 seeds · 7 to 9 of 200 to 801 epochs"
    )
    whole = [record("T2-05"), record("T2-08", epochs=200, published_epochs=200)]
    assert caption(whole).endswith("1 seed · 200 to 801 epochs")


def test_caption_names_the_networks_at_reduced_size():
    small = {"width": 0.25, "depth": 0.1}
    rows = [
        record("T2-08", model="CPL-XL", size=small),
        record("T2-10", model="SLL-XL", size=small),
    ]
    rows += [record("T2-06", model="LipConvNet-20", size={"width": 0.5, "depth": 1.0}), record()]
    assert caption(rows).endswith(
        "networks at reduced size (width 0.25, depth 0.1 of CPL-XL, SLL-XL; "
        "width 0.5 of LipConvNet-20)"
    )
    assert "reduced" not in caption([record()])


def test_caption_says_which_runs_trained_in_less_than_float32():
    plain, rounded = record(), record(seed=2, params={"precision": "bfloat16"})
    assert caption([plain, rounded]).endswith("1 of 2 runs trained in bfloat16")
    assert caption([rounded]).endswith("801 epochs · trained in bfloat16")
    assert "trained" not in caption([plain, record(params={"precision": "float32"})])


def test_caption_says_to_what_size_digits_were_enlarged():
    shapes = [(3, 16, 16), (3, 32, 32), (3, 16, 16)]
    rows = [record(data="digits", input_shape=list(shape)) for shape in shapes]
    assert "digits enlarged to 16x16, 32x32, a mechanics check" in caption(rows)


def test_moons_table_finds_the_printed_value_of_each_slack():
    runs = [moons_record(p=0.75, cra=0.9), moons_record(p=1e-4, cra=0.999, seed=1)]
    runs += [moons_record(p=1e-4, cra=0.998, seed=2), moons_record("GloRo", cra=0.99, K=150.0)]
    table = moons_table(runs)
    assert list(table["method"]) == ["CLL", "CLL", "GloRo"]
    assert list(table["n"]) == [1, 2, 1]
    assert list(table["cra_published"])[:2] == [90.2, 99.9]
    assert table["difference"][0] == pytest.approx(-0.2)
    assert math.isnan(table["cra_published"][2]) and table["K_hf"][2] == 150
    assert math.isnan(table["cra_std"][0])
    assert table["cra_std"][1] == pytest.approx(np.std([99.9, 99.8], ddof=1))
    shown = display_moons(table)
    assert shown.loc[("CLL", "0.15", "0.75"), "CRA % (train)"] == "90.00 (-0.20)"


def test_annealed_slack_is_not_mistaken_for_a_printed_one():
    assert moons_table([moons_record(p=1e-15)])["cra_published"].isna().all()


def test_verdicts_follow_the_numbers():
    runs = [moons_record(cra=0.9995, p=1e-15), moons_record("GloRo", cra=0.98)]
    verdicts = paper.claims.claims("figure4", runs)["verdict"]
    assert list(verdicts[:3]) == ["holds"] * 3
    assert set(verdicts[3:]) == {"not run"}
    worse = [moons_record(cra=0.97, p=1e-15), moons_record("GloRo", cra=0.98)]
    assert list(paper.claims.claims("true_margin", worse)["verdict"]) == [
        "does not hold", "holds", "does not hold"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no claims about 'figure9'"):
        paper.claims.claims("figure9", [])


def shaped(result, turns=1.0, output=50.0, tails=0.9, inside=0):
    return result | {"shape": dict(turns=turns, output=output, tails=tails, inside=inside)}


def test_verdicts_on_figures_1_and_2():
    much = moons_record(p=0.75, cra=0.91, K_hf=3.4)
    little = moons_record(p=1e-15, cra=1.0, K_hf=234.9)
    found = paper.claims.claims("figure1", [shaped(much, turns=0.1), shaped(little)])["verdict"]
    assert set(found) == {"holds"} and len(found) == 5
    found = paper.claims.claims("figure1", [shaped(much | {"train_cra": {"0.15": 0.8}})])["verdict"]
    assert found.iloc[0] == "does not hold" and set(found.iloc[1:3]) == {"not run"}

    plain = shaped(moons_record("CE", cra=0, K=1e4, epsilon=0.15), turns=2)
    gloro = shaped(moons_record("GloRo", cra=0.98, K=100), turns=0.5, output=20, inside=3)
    found = paper.claims.claims("figure2", [plain, gloro, shaped(little)])["verdict"]
    assert set(found) == {"holds"} and len(found) == 8
    for change in ({"turns": 3}, {"inside": 0}, {"output": 30}):
        other = gloro | {"shape": gloro["shape"] | change}
        found = paper.claims.claims("figure2", [plain, other, shaped(little)])["verdict"]
        assert "does not hold" in set(found)


def test_slack_verdicts():
    found = {0.75: 0.9005, 0.25: 0.989, 0.01: 0.9985, 1e-4: 0.999}
    verdicts = paper.claims.claims(
        "slack_sweep", [moons_record(p=p, cra=c) for p, c in found.items()]
    )
    assert len(verdicts) == 9 and set(verdicts["verdict"]) == {"holds"}
    verdicts = paper.claims.claims("slack_sweep", [moons_record(p=0.25, cra=0.96)])
    assert verdicts.loc["p = 0.25: CRA within a point", "verdict"] == "does not hold"


def verdicts(results, table="table2"):
    return paper.claims.claims(table, results)["verdict"]


HIGH, LOW = ({"36/255": c, "72/255": c - 0.2, "108/255": c - 0.3} for c in (0.7, 0.6))


def test_digits_give_no_verdict_on_the_table():
    both = [record("T2-03", cra=LOW), record("T2-05", cra=HIGH)]
    assert verdicts(both)["4C3F: CLL certifies more than GloRo"] == "holds"
    assert verdicts(both)["6C2F: CLL certifies more than GloRo"] == "not run"
    digits = verdicts([r | {"data": "digits"} for r in both])
    assert digits["4C3F: CLL certifies more than GloRo"] == "no verdict: digits"


def test_a_shortened_schedule_shows_what_is_so_far():
    claim = "4C3F: CLL certifies more than GloRo"
    short = record("T2-05", cra=HIGH, epochs=40)
    assert verdicts([record("T2-03", cra=LOW), short])[claim] == "holds so far"
    assert verdicts([record("T2-03", cra=HIGH), short | {"cra": LOW}])[claim] == (
        "does not hold so far"
    )
    almost = record("T2-05", cra=HIGH, epochs=800)  # of 801, as released configurations have it
    assert verdicts([record("T2-03", cra=LOW), almost])[claim] == "holds"


def test_every_radius_must_hold():
    mixed = HIGH | {"108/255": 0.2}
    claims = paper.claims.claims("table2", [record("T2-03", cra=LOW), record("T2-05", cra=mixed)])
    line = claims.loc["4C3F: CLL certifies more than GloRo"]
    assert line["verdict"] == "does not hold"
    assert line["paper"] == "61.4 vs 59.6, 44.2 vs 40.8, 29.1 vs 24.8"
    assert line["here"] == "70.0 vs 60.0, 50.0 vs 40.0, 20.0 vs 30.0"


def test_the_best_rival_counts_and_all_must_have_run():
    rivals = [record(row, cra=LOW) for row in ("T1-05", "T1-06", "T1-08", "T1-09")]
    ours = record("T1-07", cra=HIGH)
    claim = "LipConv-20: CLL certifies more than SOC, SLL and LBDN"
    assert verdicts([ours, *rivals], "table1")[claim] == "holds"
    assert verdicts([ours, *rivals[1:]], "table1")[claim] == "not run"
    better = record("T1-08", cra=HIGH | {"72/255": 0.9})
    assert verdicts([ours, *rivals[:2], better, rivals[3]], "table1")[claim] == "does not hold"


def printed_as_results(table):
    results = []
    for row_id, row in published(table).iterrows():
        k_f = row["k_f"] if pd.notna(row["k_f"]) else row["k_f_derived"]
        printed = {"clean": row["clean"] / 100, "K_f": k_f, "K_hf": row["k_hf"]}
        printed["cra"] = {RADII[c]: row[c] / 100 for c in RADII}
        printed["tightness"] = row["tightness"] / 100
        sizes = {"8C2F": 4.34e6, "Sandwich": 39e6, "XL": 1.1e9}
        results.append(record(row_id, **printed, parameters=sizes.get(row["model"])))
    return results


def test_the_papers_own_numbers_show_its_claims():
    """Every claim about single rows holds for the printed cells; an error in the list would not.
    What the abstract says of all pairs alike does not hold in every word, see PAIRS."""
    refuted = {
        "every pair: CLL certifies more at every radius": "SLL-XL",
        "every pair: two points more CRA at some radius": "LipConv-20, SLL-XL",
        "every pair: clean accuracy not below": "SLL-XL",
        "every pair: a tighter bound": "LipConv-20, SLL-XL",
    }
    for table in ("table1", "table2"):
        claims = paper.claims.claims(table, printed_as_results(table))
        wrong = claims[claims["verdict"] == "does not hold"]
        assert set(wrong.index) == (set(refuted) if table == "table2" else set()), wrong
        for claim, line in wrong.iterrows():
            assert f"(not {refuted[claim]}" in line["here"]
        # cells that the sources lack: GloRo's K(f) and more
        assert (claims["verdict"] != "not run").mean() > 0.8
        # judged without results: the same verdicts, where the numbers are sure
        own = paper.claims.claims(table, None)["verdict"]
        judged = own[own != "not run"]
        assert len(judged) > 0.7 * len(own)
        assert (judged == claims["verdict"][judged.index]).all()


def test_every_pair_needs_every_pair():
    claim = "every pair: CLL certifies more at every radius"
    rows = [record(ours, cra=HIGH) for _, ours, _ in PAIRS["table2"]]
    rivals = [record(baseline, cra=LOW) for _, _, baseline in PAIRS["table2"]]
    assert verdicts([*rows, *rivals])[claim] == "holds"
    # the pair of 6C2F is not printed at all radii and not judged; 4C3F's is
    assert verdicts([*rows[1:], *rivals])[claim] == "holds"
    assert verdicts([rows[0], *rows[2:], *rivals])[claim] == "not run"
    worse = record("T2-03", cra=HIGH)
    lines = paper.claims.claims("table2", [*rows, rivals[0], worse, *rivals[2:]])
    assert lines.loc[claim, "verdict"] == "does not hold"
    assert lines.loc[claim, "here"] == "6 of 7 (not 4C3F)"


def test_the_algebra_of_figure_3():
    verdict = paper.claims.claims("figure3", [])["verdict"]
    word_for_word = [claim for claim in verdict.index if "word for word" in claim]
    assert list(verdict[word_for_word]) == ["does not hold"]
    assert set(verdict.drop(word_for_word)) == {"holds"}
    assert len(_printed_constants()) == 13  # nine rows of the tables, four panels


def tempered(t, cra=1.0, K=200.0, seed=1):
    params = {"loss": {"temperature": t}, "tightness": None}
    return moons_record(
        "GloRo", cra=cra, K=K * t, K_hf=K, seed=seed, params=params, train_clean=1.0
    )


def test_temperature_claims():
    slack = [
        moons_record(p=p, cra=c, train_clean=1.0) for p, c in ((0.75, 0.9), (0.01, 0.98), (1e-4, 1))
    ]
    runs = [tempered(t, seed=s) for t in (0.1, 1, 10) for s in (1, 2)] + slack
    table = temperature_table(runs)
    assert list(table["n"]) == [1, 1, 1, 2, 2, 2] and list(table["t"])[3:] == [10, 1, 0.1]
    assert set(paper.claims.claims("temperature", runs)["verdict"]) == {"holds"}
    other = [*runs[2:], tempered(0.1, cra=0.9, K=2000)]
    verdict = list(paper.claims.claims("temperature", other)["verdict"])
    assert verdict == ["does not hold", "holds", "does not hold", "holds"]
    assert set(paper.claims.claims("temperature", [])["verdict"]) == {"not run"}
    assert display_temperature(table).shape == (6, 5)


def test_every_test_of_the_checklist_is_made_by_its_notebook():
    """A claim that was reworded must not leave the checklist with a test that never runs."""
    made = {name: set(paper.claims.claims(name, []).index) for name in (
        "table1", "table2", "figure1", "figure2", "figure3", "figure4", "figure5", "slack_sweep",
        "convergence", "lambda_sweep", "temperature", "aol_mapping")}  # fmt: skip
    made["slack_sweep"] |= set(paper.claims.claims("true_margin", []).index)
    for name, _, tests in CHECKLIST:
        assert tests, name
        for notebook, test in tests:
            assert test in made[notebook], f"{name}: no test {test!r} in {notebook}"
    names = [name for name, _, _ in CHECKLIST]
    listed = {"A": 7, "I": 3, "S": 7, "E": 5, "C": 4}
    assert names == [f"{part}{i + 1}" for part, n in listed.items() for i in range(n)]


def test_checklist_reads_what_the_notebooks_left(tmp_path):
    empty, tests = checklist(read_claims(tmp_path))
    assert set(empty["verdict"]) == {"not run"} and set(tests["here"]) == {"–"}
    assert empty.loc["A5", "printed"] == "does not hold"
    assert empty.loc["E1", "printed"] == "holds"
    assert empty.loc["S1", "printed"] == "–"

    def leave(notebook, frame, name="claims", about="profile paper"):
        save_table(frame, frame, tmp_path / notebook / name, about)

    leave("figure3", paper.claims.claims("figure3", []))
    summary, tests = checklist(read_claims(tmp_path))
    assert summary.loc["S1", "verdict"] == "holds"
    assert summary.loc["S2", "verdict"] == "does not hold"
    assert summary.loc["A3", "verdict"] == "not run"
    assert summary.loc["A3", "tests"] == "2 hold, 1 not run"
    assert set(tests.loc["S1", "about"]) == {"profile paper"}

    # the same test on images and on two moons: both must hold
    good = paper.claims.claims("lambda_sweep", [])
    good["here"], good["verdict"] = "x", "holds"
    leave("lambda_sweep", good, "claims_moons")
    assert checklist(read_claims(tmp_path))[0].loc["S3", "verdict"] == "holds"
    for verdict, tests in (
        ("holds so far", "2 hold, 2 hold so far"),
        ("does not hold so far", "2 hold, 2 do not so far"),
    ):
        leave("lambda_sweep", good.assign(verdict=verdict), "claims_images")
        summary, _ = checklist(read_claims(tmp_path))
        assert list(summary.loc["S3", ["verdict", "tests"]]) == [verdict, tests]
    leave("lambda_sweep", good.assign(verdict="no verdict: digits"), "claims_images")
    summary, _ = checklist(read_claims(tmp_path))
    assert summary.loc["S3", "verdict"] == "not run"
    assert summary.loc["S3", "tests"] == "2 hold, 2 no verdict"
    leave("claims", good)  # what the claims notebook itself leaves is not read
    assert len(read_claims(tmp_path)) == len(paper.claims.claims("figure3", [])) + 2 * len(good)


def test_sizes_are_not_judged_on_reduced_networks():
    rows = [record(r, parameters=n) for r, n in (("T1-10", 4e6), ("T1-09", 4e7), ("T1-08", 1e9))]
    claim = "fewer parameters: 8C2F < Sandwich < SLL-XL"
    assert verdicts(rows, "table1")[claim] == "holds"
    rows[1] |= {"size": {"width": 0.5, "depth": 1.0}}
    assert verdicts(rows, "table1")[claim] == "no verdict: reduced size"


def test_tables_are_saved_raw_and_readable(tmp_path):
    frame = comparison_table([record()], rows=["T2-05"])
    shown = display_table(frame)
    assert save_table(frame, shown, tmp_path / "new" / "t", "caption | here") is shown
    back = pd.read_csv(tmp_path / "new" / "t.csv")
    assert back["mean"].to_numpy() == pytest.approx(frame["mean"].to_numpy())
    lines = (tmp_path / "new" / "t.md").read_text().splitlines()
    assert lines[-1] == "caption | here"
    assert {line.count("|") for line in lines[:5]} == {shown.shape[1] + shown.index.nlevels + 1}


def test_run_table_shows_both_bounds():
    table = run_table(record())
    assert list(table.loc["CRA at 36/255, %"]) == ["60.0", "61.0"]
    assert list(table.loc["K(h∘f)"]) == ["11.56", "11.56"]


# --------------------------------------------------------------------------------------- notebooks
def test_train_notebook_takes_every_key_of_a_parameter_file():
    cells = json.loads((cll.ROOT / "notebooks" / "train.ipynb").read_text())["cells"]
    (source,) = [c["source"] for c in cells if "parameters" in c["metadata"].get("tags", [])]
    declared = {node.targets[0].id for node in ast.parse("".join(source)).body}
    assert declared == set(cll.experiment.Params.model_fields) | {
        "params_file", "base", "profiles", "outputs"
    }  # fmt: skip


def test_a_short_tightness_search_is_named():
    search = {"method": "optimized", "pairs": 4000, "steps": 1000}
    assert tightness_note([{"params": {"tightness": search}}]) == ""
    assert tightness_note([{"params": {"tightness": None}}]) == ""
    note = tightness_note([{"params": {"tightness": search | {"pairs": 128, "steps": 50}}}])
    assert "128 pairs x 50 steps" in note


def test_gloro_with_the_exact_gradient_has_lines_of_its_own():
    exact = moons_record("GloRo", cra=0.999, params={"loss": {"gradient": "exact"}})
    table = moons_table([moons_record("GloRo", cra=0.9), exact])
    assert dict(zip(table["method"], table["cra"], strict=True)) == pytest.approx(
        {"GloRo": 90.0, "GloRo, exact gradient": 99.9}
    )


# ------------------------------------------------------------- figure 5, convergence, lambda sweep
EPSILONS = (0.15, 0.25, 0.5, 0.75, 1.0, 1.25)
SLACKS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def sweep_record(method="CLL", epsilon=0.15, p=0.3, lam=1e-4, cra=0.6, **changes):
    result = record("T2-05" if method == "CLL" else "T2-03", **changes)
    loss = {"lambda": lam} if method == "CLL" else {}
    result |= {"method": method, "epsilon": epsilon, "p": p if method == "CLL" else None}
    result |= {"cra": {f"{epsilon:g}": cra}, "params": {"loss": loss, "tightness": None}}
    if "K_hf" not in changes:
        result["K_hf"] = 1 / cll.cll_scale(epsilon, p) if method == "CLL" else result["K_f"]
    return result | changes


@pytest.fixture
def as_printed():
    """Figure 5 as the paper prints it; the unprinted part as its text describes it."""
    table = published("figure5").query("panel == 'eps_sweep_table'")
    runs = []
    for line in table.to_dict("records"):
        changes = {"K_f": 72.1, "tightness": 0.8}
        if line["method"] == "GloRo":
            changes = {"K_f": 1.1 / line["epsilon"], "tightness": 0.71}
        runs.append(sweep_record(line["method"], line["epsilon"], cra=line["cra_at_eps"] / 100,
                                 **changes))  # fmt: skip
    peak = {p: 0.606 - (p - 0.3) ** 2 for p in SLACKS if p != 0.3}
    return runs + [sweep_record(p=p, cra=cra, clean=0.8 - 0.1 * p) for p, cra in peak.items()]


def test_figure5_as_printed_holds_and_differs_from_itself_by_nothing(as_printed):
    claims = paper.claims.claims("figure5", as_printed)
    assert set(claims["verdict"]) == {"holds"} and len(claims) == 6
    table = sweep_table(as_printed)
    assert table["difference"].dropna().abs().max() < 1e-9 and table["difference"].count() == 12
    gains = gain_table(table)
    assert list(gains["gain"]) == pytest.approx(list(gains["gain_published"]))
    assert list(gains["gain"].round(1)) == [3.1, 4.0, 3.1, 6.3, 6.1, 3.0]
    assert list(gains["epsilon"]) == list(EPSILONS)
    shown = display_gains(gains)
    assert list(shown.loc["relative gain %", "ε = 0.75"]) == ["+6.3", "+6.3"]


def test_figure5_claims_fail_where_they_should(as_printed):
    def verdict(runs, start):
        claims = paper.claims.claims("figure5", runs)["verdict"]
        return list(claims[claims.index.str.startswith(start)])

    worse = [r | {"cra": {"1": 0.215}} if r["epsilon"] == 1 and r["method"] == "CLL" else r
             for r in as_printed]  # fmt: skip
    assert verdict(worse, "E1") == ["does not hold"]
    loose = [r | {"tightness": 0.6} if r["method"] == "CLL" else r for r in as_printed]
    assert verdict(loose, "E2: CLL's tightness") == ["does not hold"]
    missing = [r for r in as_printed if r["p"] != 0.4 and r["epsilon"] != 0.5]
    assert set(verdict(missing, "")) == {"not run"}
    falling = [r | {"cra": {"0.15": 0.7 - r["p"]}} if r["p"] and r["epsilon"] == 0.15 else r
               for r in as_printed]  # fmt: skip
    assert verdict(falling, "S7") == ["holds", "does not hold"]
    assert set(verdict([], "")) == {"not run"}


def test_seeds_are_averaged_and_digits_are_not_compared():
    runs = [sweep_record(cra=cra, seed=s) for s, cra in ((1, 0.59), (2, 0.61))]
    (line,) = sweep_table(runs).to_dict("records")
    assert (line["n"], line["cra"]) == (2, pytest.approx(60)) and line["cra_published"] == 60.6
    assert line["difference"] == pytest.approx(-0.6)
    (line,) = sweep_table([sweep_record(data="digits")]).to_dict("records")
    assert np.isnan(line["difference"])


def test_slope_of_lambda_and_the_flat_range():
    runs = [sweep_record(lam=lam, K_f=0.7 * lam**-0.5) for lam in (1e-6, 1e-5, 1e-4, 1e-3)]
    assert lambda_slope(sweep_table(runs)) == pytest.approx((-0.5, 0.7))
    assert set(paper.claims.claims("lambda_sweep", runs)["verdict"]) == {"holds"}
    runs[1] |= {"clean": 0.5}  # leaves 1e-4 to 1e-3: one decade
    claims = paper.claims.claims("lambda_sweep", runs)
    assert claims["here"].iloc[-1] == "1.0 decades"
    assert claims["verdict"].iloc[-1] == "does not hold"
    flat = [sweep_record(lam=lam, K_f=70.0) for lam in (1e-6, 1e-5, 1e-4)]
    assert list(paper.claims.claims("lambda_sweep", flat)["verdict"][:2]) == ["does not hold"] * 2
    assert set(paper.claims.claims("lambda_sweep", runs[:1])["verdict"]) == {"not run"}
    assert set(paper.claims.claims("lambda_sweep", [])["verdict"]) == {"not run"}


def snapshots(values):
    return [{"epoch": e, "clean": 0.7, "cra": {"0.15": v}, "K_f": 9.0, "tightness": v}
            for e, v in values.items()]  # fmt: skip


def test_convergence_is_the_first_epoch_at_95_percent_of_the_last_value():
    assert reached([1, 2, 5], [0.1, 0.95, 1.0]) == 2
    assert reached([1, 2, 5], [0.1, 0.94, 1.0]) == 5
    assert np.isnan(reached([], []))
    fast = sweep_record(snapshots=snapshots({1: 0.2, 2: 0.59, 5: 0.6}))
    slow = sweep_record("GloRo", snapshots=snapshots({1: 0.1, 2: 0.3, 5: 0.6}))
    claims = paper.claims.claims("convergence", [fast, slow])
    assert set(claims["verdict"]) == {"holds"} and claims["here"].iloc[0] == "epoch 2 vs 5"
    swapped = [slow | {"method": "CLL"}, fast | {"method": "GloRo"}]
    assert set(paper.claims.claims("convergence", swapped)["verdict"]) == {"does not hold"}
    for part in ([fast], [], [sweep_record()]):
        assert set(paper.claims.claims("convergence", part)["verdict"]) == {"not run"}


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


def test_ablation_of_a_loss_without_slack_is_a_network_of_its_own():
    runs = ablated()
    for gradient, cra in (("published", 0.5), ("exact", 0.4)):
        run = record("T2-03", cra=dict.fromkeys(("36/255", "72/255", "108/255"), cra))
        loss = {"name": "GloRo", "gradient": gradient}
        runs.append(run | {"params": {"loss": loss, "tightness": None}})
    table = ablation_table(runs)
    shown = display_ablation(table)
    assert list(shown.index.get_level_values("network").unique()) == ["4C3F", "4C3F, GloRo"]
    gloro = shown.loc["4C3F, GloRo"]["CRA 36/255 %"]
    assert list(gloro) == ["50.00", "40.00 (-10.00)", "59.6"]
    assert list(gloro.index) == [
        ("–", "gradient = published (usual)"), ("–", "gradient = exact"), ("–", "paper")
    ]  # fmt: skip


def test_ablation_compares_with_the_usual_choice():
    table = ablation_table(ablated())
    assert list(table["choice"].unique()) == ["offset = two-sided", "offset = one-sided"]
    cra = table[table["measure"] == "CRA 36/255"].set_index("base")
    assert cra["n"].tolist() == [2, 2]
    assert cra["mean"].tolist() == pytest.approx([61.5, 64.5])
    assert cra["std"].tolist() == pytest.approx([2**-0.5] * 2)
    assert np.isnan(cra.loc[True, "difference"])
    assert cra.loc[False, "difference"] == pytest.approx(3)
    assert cra["published"].tolist() == [61.4, 61.4]
    shown = display_ablation(table).reset_index()
    assert shown["choice"].tolist()[0] == "offset = two-sided (usual)"
    assert shown["choice"].tolist()[-1] == "paper"
    assert shown["CRA 36/255 %"].tolist() == ["61.50 ± 0.71", "64.50 ± 0.71 (+3.00)", "61.4"]
    digits = ablation_table(ablated(data="digits"))
    assert digits["published"].isna().all()
    assert (display_ablation(ablation_table([])) == "not run").all(axis=None)


def test_ablation_on_two_moons_is_about_the_training_points():
    runs = [
        moons_record(p=0.75, cra=cra) | {"params": {"loss": {"form": form, "detach": True}}}
        for form, cra in (("pairwise", 0.90), ("per-logit", 0.91))
    ]
    table = ablation_table(runs)
    assert table["measure"].unique().tolist() == ["CRA 0.15"]
    assert table["mean"].tolist() == pytest.approx([90, 91])
    assert table["published"].tolist() == [90.2, 90.2] and table["std"].isna().all()
