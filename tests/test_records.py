"""The published numbers agree with each other; captions say what was shortened, tables are saved."""

import pandas as pd
import pytest
from exhibits import moons_record, record

import cll
from paper.records import caption, epochs, published, save_table, tightness_note, uncertain
from paper.tables import comparison_table, display_table


@pytest.mark.parametrize("table", ["table1", "table2"])
def test_printed_K_hf_is_one_over_the_calibrated_scale(table):
    rows = published(table).dropna(subset=["epsilon", "p", "k_hf"])
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


def test_unknown_table_is_named():
    with pytest.raises(ValueError, match="no published table 'table3'; there are: figure5"):
        published("table3")


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
    found = record(params={"precision": "auto"}, trained={"precision": "float32"})
    assert "trained" not in caption([found])


def test_caption_names_the_quick_recipe():
    quick = record(profile="quick", recipe="quick", epochs=16)
    assert caption([quick]) == "profile quick · data cifar10 · 1 seed · quick recipe, 16 epochs"
    some = caption([quick, record(seed=2, epochs=40), record(seed=3, epochs=8, recipe="own")])
    lengths = "40 of 801 epochs (1 of 3 runs)", "quick recipe, 16 epochs (1 of 3 runs)"
    assert " · ".join([*lengths, "another recipe, 8 epochs (1 of 3 runs)"]) in some
    assert "· 1 seed ·" in caption([record(), record(profile="quick", seed=2)])  # of each
    assert (epochs(quick), epochs(record(epochs=7))) == ("16, quick recipe", "7 of 801")


def test_caption_says_to_what_size_digits_were_enlarged():
    shapes = [(3, 16, 16), (3, 32, 32), (3, 16, 16)]
    rows = [record(data="digits", input_shape=list(shape)) for shape in shapes]
    assert "digits enlarged to 16x16, 32x32, a mechanics check" in caption(rows)


def test_tables_are_saved_raw_and_readable(tmp_path):
    frame = comparison_table([record()], rows=["T2-05"])
    shown = display_table(frame)
    assert save_table(frame, shown, tmp_path / "new" / "t", "caption | here") is shown
    back = pd.read_csv(tmp_path / "new" / "t.csv")
    assert back["mean"].to_numpy() == pytest.approx(frame["mean"].to_numpy())
    lines = (tmp_path / "new" / "t.md").read_text().splitlines()
    assert lines[-1] == "caption | here"
    assert {line.count("|") for line in lines[:5]} == {shown.shape[1] + shown.index.nlevels + 1}


def test_a_short_tightness_search_is_named():
    search = {"method": "optimized", "pairs": 4000, "steps": 1000}
    assert tightness_note([{"params": {"tightness": search}}]) == ""
    assert tightness_note([{"params": {"tightness": None}}]) == ""
    note = tightness_note([{"params": {"tightness": search | {"pairs": 128, "steps": 50}}}])
    assert "128 pairs x 50 steps" in note
