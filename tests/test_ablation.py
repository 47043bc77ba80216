"""The ablation compares each choice with the usual one."""

import numpy as np
import pytest
from exhibits import ablated, moons_record, record

from paper import ablation
from paper.ablation import ablation_table, display_ablation


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


@pytest.mark.parametrize("profile", ["smoke", "quick", "paper"])
def test_each_choice_on_images_stands_beside_one_usual_run(profile):
    images, _ = ablation.runs(profile, [1])
    usual = {run.row: run.loss for run in images if run.row}
    assert list(usual) == ["T2-07", "T2-04", "T2-03", "T2-05"]
    assert usual["T2-03"].gradient == "published"
    choices = [run.loss for run in images if not run.row]
    assert len(choices) == len(usual) and not any(loss in usual.values() for loss in choices)


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
