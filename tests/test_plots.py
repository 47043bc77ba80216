"""The figures show what the numbers say."""

import json
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from test_paper import ablated, moons_record, record, snapshots, sweep_record, tempered

import cll
import paper.moons
import paper.style
from paper.ablation import ablation_figure, ablation_table
from paper.choose import (
    choose_figure,
    slack_curves,
    temperature_figure,
    temperature_planes,
    temperature_table,
)
from paper.claims import checklist, claims_figure, read_claims
from paper.formulas import calibrated_logistic, loss_curves
from paper.moons import figure1, figure2, figure4, moons_gallery, moons_panel, slack_figure
from paper.own import certified_images, cra_figure, radius_histogram, training_curves
from paper.style import RED
from paper.sweeps import convergence_figure, figure5, lambda_figure
from paper.tables import cra_comparison, seeds_figure, table_runs


@pytest.fixture(scope="module")
def half_plane():
    """A network that answers 1 to the right of x = 0 and knows its distance exactly: K = 2."""
    net = cll.LipschitzNet(torch.nn.Sequential(torch.nn.Identity()), torch.nn.Linear(2, 2), (2,))
    with torch.no_grad():
        net.head.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
        net.head.bias.zero_()
    return net


@pytest.fixture(scope="module")
def points():
    x = torch.tensor([[-1.0, 0.3], [-0.1, 0.0], [0.2, -0.4], [0.5, 0.2], [0.9, 0.1]])
    targets = torch.tensor([0, 0, 1, 1, 0])
    return SimpleNamespace(train_images=x, train_targets=targets)


def radii(n=200, seed=0):
    generator = np.random.default_rng(seed)
    radius = generator.exponential(0.2, n)
    correct = generator.random(n) < 0.8
    return {"radius": radius, "radius_paper_style": 1.01 * radius, "correct": correct}


def line(ax, label):
    (found,) = [item for item in ax.get_lines() if item.get_label().startswith(label)]
    return found.get_data()


def texts(figure):
    return " ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text)).replace("\n", " ")


def test_calibrated_logistic_has_its_tails_at_the_margin():
    figure = calibrated_logistic(epsilon=0.15, p=0.01, slack=0.5)
    calibrated, offset, lenient = figure.axes
    x, y = line(calibrated, "p = 0.01")
    assert np.interp([-0.15, 0.15], x, y) == pytest.approx([0.005, 0.995], abs=1e-6)
    x, y = line(lenient, "p = 0.5")
    assert np.interp([-0.15, 0.15], x, y) == pytest.approx([0.25, 0.75], abs=1e-6)


def test_the_offset_moves_each_class_outwards():
    offset = calibrated_logistic(epsilon=0.15, p=0.01).axes[1]
    x, y = line(offset, "y = +1")
    assert np.interp([0.15, 0.0], x, y) == pytest.approx([0.5, 0.005], abs=1e-6)
    x, y = line(offset, "y = −1")
    assert np.interp([-0.15, 0.0], x, y) == pytest.approx([0.5, 0.005], abs=1e-6)


def test_moons_panel_reports_and_marks_what_is_not_certified(half_plane, points):
    figure = matplotlib.figure.Figure()
    ax = figure.subplots()
    found = moons_panel(ax, half_plane, points.train_images, points.train_targets, 0.15)
    # x = -0.1 is right but nearer than 0.15 to the boundary, x = 0.9 is wrong
    assert found["cra"] == pytest.approx(3 / 5)
    assert found["K"] == pytest.approx(2, rel=1e-6)
    red = matplotlib.colors.to_rgba(RED)
    (crosses,) = [c for c in ax.collections if c.get_facecolor().tolist() == [list(red)]]
    assert sorted(crosses.get_offsets()[:, 0].tolist()) == pytest.approx([-0.1, 0.9])
    assert "CRA 60.00 %" in texts(figure) and "K 2.0" in texts(figure)


def test_moons_panel_draws_the_boundary_and_the_margin_where_they_are(half_plane, points):
    ax = matplotlib.figure.Figure().subplots()
    moons_panel(ax, half_plane, points.train_images, points.train_targets, 0.15)
    contours = [c for c in ax.collections if isinstance(c, matplotlib.contour.QuadContourSet)]
    drawn = {}
    for contour in contours[1:]:  # the first is the filled band
        (level,) = contour.levels
        drawn[level] = contour.get_paths()[0].vertices[:, 0]
    assert set(drawn) == {-0.15, 0.15, 0}
    for level, x in drawn.items():
        assert x == pytest.approx(level, abs=1e-6)


def test_figure4_has_a_row_per_method_and_names_the_true_margin(half_plane, points):
    results = [moons_record(method, epsilon=e) for method in ("CLL", "GloRo") for e in (0.1, 0.15)][
        :3
    ]
    figure = figure4(results, [half_plane] * 3, points)
    assert [ax.get_title() for ax in figure.axes[:2]] == ["ε = 0.10", "ε = 0.15 (true margin)"]
    assert figure.axes[0].get_ylabel().startswith("CLL")
    assert figure.axes[2].get_ylabel().startswith("GloRo")
    assert "not run" in [t.get_text() for t in figure.axes[3].texts]


def test_slack_figure_goes_from_much_slack_to_little_beside_the_papers_cra(half_plane, points):
    results = [moons_record(p=p) for p in (1e-4, 0.75)]
    figure = slack_figure(results, [half_plane] * 2, points)
    first, last = (ax.get_title() for ax in figure.axes)
    assert "p = 0.75" in first and "= 3.4" in first and "CRA 90.2 %" in first
    assert "p = 0.0001" in last and "= 66.0" in last and "CRA 99.9 %" in last


def test_titles_tell_a_shortened_schedule_from_a_whole_one(half_plane, points):
    short = [moons_record(profile="quick", epochs=300)]
    title = figure4(short, [half_plane], points).get_suptitle().replace("\u00a0", " ")
    assert "profile quick" in title and "300 of 1001 epochs" in title
    whole = figure4([moons_record()], [half_plane], points).get_suptitle()
    assert " of " not in whole.replace("\u00a0", " ")


def test_figure1_shows_the_extremes_and_the_axis_between(half_plane, points):
    results = [moons_record(p=p, cra=c) for p, c in ((1e-4, 0.99), (0.75, 0.9), (1e-15, 1.0))]
    figure = figure1(results, [half_plane] * 3, points)
    left, right, axis = figure.axes
    assert "p = 0.75" in left.get_title() and "p = 1e-15" in right.get_title()
    assert axis.get_xlim() == (1, 0)
    for p in (0.75, 1e-4, 1e-15):
        marked = [item.get_xydata()[0] for item in axis.get_lines() if item.get_marker() == "o"]
        at = next(y for x, y in marked if x == p)
        assert at == pytest.approx(1 / cll.cll_scale(0.15, p))
    assert "CRA 99.00 %" in texts(figure) and "CRA 100.00 %" in texts(figure)


def test_figure2_colours_the_outputs_by_robustness(half_plane, points):
    """f_1 - f_0 = 2 x_1 and K = 2: outputs within 0.3 of 0 are not robust, one point is wrong."""
    results = [moons_record(method) for method in ("CE", "GloRo", "CLL")]
    figure = figure2(results, [half_plane] * 3, points)
    below = next(ax for ax in figure.axes if ax.get_xlabel().startswith("output"))
    counts = [sum(patch.get_height() for patch in bars) for bars in below.containers]
    assert counts == [1, 2, 2]  # robust of class 0, of class 1; wrong or in the margin
    lines = [item.get_xdata()[0] for item in below.get_lines()]
    assert lines == pytest.approx([-0.3, 0.3])
    plane, logistic = figure.axes[0], figure.axes[-1]
    assert plane.get_xlabel() and plane.get_ylabel() and "probability" in logistic.get_ylabel()
    empty = figure2(results[1:], [half_plane] * 2, points)
    assert "not run" in texts(empty)


def test_loss_curves_bend_at_twice_the_margin():
    figure = loss_curves({"a": (0.5, 0.01), "b": (0.75, 0.03)}, "computed")
    for label, epsilon, p in (("a", 0.5, 0.01), ("b", 0.75, 0.03)):
        d, loss = line(figure.axes[0], label)
        sigma = cll.cll_scale(epsilon, p)
        assert np.interp(2 * epsilon, d, loss) == pytest.approx(sigma * np.log(2), rel=1e-3)
        assert (loss[0] - loss[10]) / (d[10] - d[0]) == pytest.approx(1, abs=1e-3)
    assert "computed" in texts(figure)


def test_training_curves_are_in_percent():
    curve = pd.DataFrame(
        {"epoch": [1, 2], "loss": [2.0, 1.0], "train_accuracy": [0.5, 0.75], "K": [10.0, 5.0]}
    )
    figure = training_curves(curve, record(profile="quick", epochs=2))
    assert list(figure.axes[1].get_lines()[0].get_ydata()) == [50, 75]
    assert "2 of 801 epochs" in figure.get_suptitle().replace("\u00a0", " ").replace("\n", " ")


def test_cra_curve_starts_at_the_clean_accuracy_and_marks_the_tables_radii():
    arrays = radii()
    figure = cra_figure(arrays, record())
    x, y = line(figure.axes[0], "guaranteed")
    clean = arrays["correct"] & (arrays["radius"] > 0)
    assert y[0] == pytest.approx(100 * clean.mean())
    assert (np.diff(y) <= 0).all()
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert "36/255: 60.0 %" in labels and not any(x.startswith("0.15") for x in labels)


def test_cra_comparison_marks_printed_and_sure_values():
    results = [record("T2-05"), record("T2-03")]
    figure = cra_comparison([radii(), radii(seed=1)], results)
    marks = [item for item in figure.axes[0].get_lines() if len(item.get_xdata()) == 3]
    heights = {tuple(item.get_ydata()) for item in marks}
    assert heights == {(61.4, 44.2, 29.1), (59.6, 40.8, 24.8)}
    digits = cra_comparison([radii()], [record("T2-05", data="digits")])
    assert "open marks" in texts(figure).replace("\xa0", " ")
    assert "open marks" not in texts(digits).replace("\xa0", " ")
    assert figure.axes[0].get_title() == "CIFAR-10\n4C3F"
    assert digits.axes[0].get_title() == "rows of CIFAR-10, on digits\n4C3F"
    literature = cra_comparison([radii()], [record("T1-01")])  # printed at 36/255 alone
    (mark,) = [item for item in literature.axes[0].get_lines() if item.get_marker() == "s"]
    assert list(mark.get_ydata()) == [22.4]
    wrong = cra_comparison([radii()], [record("T1-07")])  # 26.0 contradicts its own (+3.5)
    (mark,) = [item for item in wrong.axes[0].get_lines() if item.get_marker() == "o"]
    assert list(mark.get_ydata()) == [20.2, 15.5]


@pytest.mark.parametrize(("table", "panels"), [("table1", 4), ("table2", 7)])
def test_whole_tables_are_drawn_in_panels_by_data_and_family(table, panels):
    runs = table_runs(table, cll.experiment.experiment_params(table, "quick"))
    results = [
        record(r.row, model=r.model, params={"loss": r.loss.model_dump()}, name=r.name)
        for r in runs
    ]
    figure = cra_comparison([radii(seed=i) for i in range(len(runs))], results)
    drawn = [ax for ax in figure.axes if ax.get_lines()]
    assert len(drawn) == panels
    labels = []
    for ax in drawn:
        handles, own = ax.get_legend_handles_labels()
        labels += [f"{ax.get_title()} {label}" for label in own]
        assert 1 <= len(own) <= 5
        looks = [(handle.get_color(), handle.get_linestyle()) for handle in handles]
        assert len(set(looks)) == len(own), "every curve of a panel has its own look"
        for handle, label in zip(handles, own, strict=True):
            assert (handle.get_linestyle() == "-") == label.startswith("CLL")
    assert len(set(labels)) == len(runs), "every run is named"


def test_radius_histogram_counts_every_sample_up_to_its_end():
    arrays = radii(1000)
    ax = radius_histogram(arrays, record()).axes[0]
    end = ax.get_xlim()[1]
    counted = sum(patch.get_height() for patch in ax.containers[0].patches)
    assert counted == (arrays["correct"] & (arrays["radius"] <= end)).sum()


def test_images_are_ordered_by_radius():
    images = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8)
    dataset = SimpleNamespace(test_images=images, class_names=["cat", "dog"])
    certificates = pd.DataFrame(
        {
            "index": range(20),
            "prediction": [0, 1] * 10,
            "correct": [True] * 19 + [False],
            "radius": np.linspace(1, 0, 20),
        }
    )
    figure = certified_images(dataset, certificates, record(), count=3)
    shown = [ax.get_title().split("\n") for ax in figure.axes]
    assert [float(title[1].removeprefix("r = ")) for title in shown] == sorted(
        float(title[1].removeprefix("r = ")) for title in shown
    )
    assert shown[0] == ["cat", "r = 0.053"] and shown[-1] == ["cat", "r = 1.000"]


def test_every_axis_of_data_is_labelled(half_plane, points):
    figures = [
        calibrated_logistic(),
        loss_curves({"a": (0.5, 0.01)}, "computed"),
        figure1([moons_record()], [half_plane], points),
        figure4([moons_record()], [half_plane], points),
        slack_figure([moons_record()], [half_plane], points),
        cra_figure(radii(), record()),
        cra_comparison([radii()], [record()]),
        radius_histogram(radii(), record()),
    ]
    for figure in figures:
        assert figure.axes[0].get_ylabel()
        assert all(ax.get_xlabel() for ax in figure.axes if ax.get_subplotspec().is_last_row())


def test_saved_pictures_carry_alt_text_and_are_reproducible(tmp_path):
    pictures = [paper.style.save(calibrated_logistic(), tmp_path / str(i) / "f", "S") for i in "ab"]
    for name in ("f.png", "f.pdf"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    data, metadata = pictures[0]._repr_mimebundle_()
    assert set(data) == {"image/png"} and metadata["image/png"]["alt"] == "S"
    json.dumps([data, metadata])
    assert repr(pictures[0]) == "S"


def test_nothing_stays_open_in_pyplot():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    calibrated_logistic()
    assert plt.get_fignums() == before


def test_the_seed_that_is_drawn_is_named(half_plane, points):
    runs = [moons_record(seed=s) for s in (4, 7)]
    title = texts(figure4(runs, [half_plane] * 2, points)).replace("\xa0", " ")
    assert "drawn: seed 4" in title
    assert "drawn" not in texts(figure4(runs[:1], [half_plane], points))


def test_figure5_draws_both_methods_and_the_papers_values_on_its_data_only():
    runs = [sweep_record(p=p) for p in (0.1, 0.3)]
    runs += [sweep_record(epsilon=0.5), sweep_record("GloRo", cra=0.5), sweep_record("GloRo", 0.5)]
    figure = figure5(runs)
    slack, certified, constants, tight = figure.axes
    assert list(line(slack, "clean")[0]) == [0.1, 0.3]
    assert list(line(certified, "CLL")[0]) == list(line(certified, "GloRo")[0]) == [0.15, 0.5]
    assert line(certified, "GloRo")[1][0] == pytest.approx(50)
    x, y = line(constants, "CLL, $K^{(h")
    assert np.interp(0.15, x, y) == pytest.approx(11.564, rel=1e-2)
    assert "open marks" in texts(figure).replace("\xa0", " ")
    digits = figure5([r | {"data": "digits"} for r in runs])
    assert "open marks" not in texts(digits).replace("\xa0", " ")
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
    alone = figure5([sweep_record(data="digits")]).axes[1]  # one method alone is drawn, too
    assert len(line(alone, "CLL")[0]) == 1 and len(line(alone, "GloRo")[0]) == 0
    search = {"method": "optimized", "pairs": 512, "steps": 250}
    short = sweep_record(params=runs[0]["params"] | {"tightness": search})
    assert "a search of 512 pairs" in texts(figure5([short])).replace("\xa0", " ")
    assert "a search of" not in texts(figure).replace("\xa0", " ")


def test_convergence_rings_stand_where_the_curve_arrives():
    run = sweep_record(snapshots=snapshots({1: 0.2, 2: 0.59, 5: 0.6}))
    figure = convergence_figure([run])  # one method alone is drawn, too
    assert list(line(figure.axes[1], "CLL")[0]) == [1, 2, 5]
    (ring,) = [item for item in figure.axes[1].get_lines() if len(item.get_xdata()) == 1]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (2, pytest.approx(59))


def test_lambda_figure_fits_and_predicts():
    runs = [sweep_record(lam=lam, K_f=0.7 * lam**-0.5) for lam in (1e-6, 1e-5, 1e-4)]
    moons = [r | {"data": "two_moons", "model": "MLP"} for r in runs]
    figure = lambda_figure(runs, moons)
    constant = figure.axes[1]
    assert np.allclose(line(constant, "predicted")[1], line(constant, "measured")[1])
    assert "fitted: λ$^{−0.50}$" in constant.get_legend_handles_labels()[1]
    assert "two_moons" in figure.axes[2].get_ylabel()
    legend = lambda_figure(runs[:1], []).axes[1].get_legend_handles_labels()[1]
    assert legend == ["measured", "paper (power iteration)"]  # no law through one point


def test_temperature_stands_above_slack(half_plane, points):
    results = [tempered(t) for t in (0.1, 1, 10)] + [
        moons_record(p=p, K_hf=9.0) for p in (0.75, 0.01)
    ]
    figure = temperature_planes(results, [half_plane] * 5, points)
    assert [ax.get_title()[:7] for ax in figure.axes[:3]] == ["t = 10,", "t = 1, ", "t = 0.1"]
    below = [ax.get_title().split(",")[0] for ax in figure.axes[3:] if ax.get_visible()]
    assert below == ["p = 0.75", "p = 0.01"]


def test_temperature_figure_anchors_its_line_at_temperature_1():
    results = [tempered(t, K=200 + t) for t in (0.1, 1, 10)]
    results += [moons_record(p=p, train_clean=1.0) for p in (0.75, 0.01)]
    figure = temperature_figure(temperature_table(results), "title")
    t, K = line(figure.axes[1], "$K^{(f)}$ ∝ t")
    assert list(K) == pytest.approx(list(201 * np.asarray(t)))
    shown = texts(figure)
    assert "p = 0.75" in shown and "p = 0.01" in shown and "5 values of t" not in shown


def test_choose_figure_has_a_cell_for_each_margin_and_slack():
    results = []
    for epsilon, p, clean in ((0.1, 0.75, 0.9), (0.1, 0.01, 0.95), (0.2, 0.01, 0.8)):
        cra = {f"{epsilon:g}": clean - 0.1, "0.15": 0.5}
        results.append(moons_record(epsilon=epsilon, p=p, clean=clean, cra=0, K=1) | {"cra": cra})
    left, middle, right = choose_figure(results, "title").axes
    cells = {t.get_position(): t for t in left.texts}
    assert cells[0, 0].get_text() == "95.0" and cells[0, 0].get_fontweight() == "bold"
    assert cells[1, 0].get_text() == "90.0" and cells[1, 1].get_text() == "–"
    assert [t.get_text() for t in middle.texts] == ["85.0", "80.0", "70.0", "–"]
    assert {t.get_text() for t in right.texts} == {"50.0", "–"}
    assert [t.get_text() for t in left.get_yticklabels()] == ["0.10", "0.20"]


def test_slack_curves_say_when_nothing_was_run():
    assert "not run" in texts(slack_curves([], "title"))
    results = [record(p=p, clean=c) for p, c in ((0.5, 0.6), (0.1, 0.7))]
    p, clean = line(slack_curves(results, "title").axes[0], "clean")
    assert list(p) == [0.1, 0.5] and list(clean) == pytest.approx([70, 60])


def test_gallery_has_a_row_per_margin_and_leaves_gaps(half_plane, points):
    plane = paper.moons.plane(half_plane, points.train_images, 41)
    keys = ("CLL", 0.1, 0.75), ("CLL", 0.1, 0.01), ("GloRo", 0.2, None)
    axes = moons_gallery(dict.fromkeys(keys, plane), points, "title").axes
    assert [ax.get_visible() for ax in axes] == [True, True, False, False, False, True]
    titles = [axes[i].get_title() for i in (0, 1, 5)]
    assert titles == ["CLL, p = 0.75", "CLL, p = 0.01", "GloRo"]


def test_claims_figure_counts_the_tests_of_each_claim():
    summary, tests = checklist(read_claims("nothing"))
    tests = tests.reset_index()
    tests.loc[tests.index[:2], "verdict"] = ["holds", "does not hold"]
    figure = claims_figure(summary, tests.set_index("id"), "title")
    ax = figure.axes[0]
    first = [bar for bar in ax.patches if abs(bar.get_y() + 0.36) < 1e-9 and bar.get_width()]
    assert [bar.get_width() for bar in first] == [1, 1, 1]
    assert len(ax.get_yticklabels()) == 26
    assert ax.get_yticklabels()[0].get_text().startswith("A1 ")


def test_seeds_are_shown_as_distances_from_their_mean():
    results = [record("T2-05", seed=k, clean=c) for k, c in ((1, 0.7), (2, 0.72))]
    others = [record("T2-03", seed=k, clean=c) for k, c in ((1, 0.5), (2, 0.5))]
    figure = seeds_figure([*results, *others, record("T2-07")])
    x, y = line(figure.axes[0], "clean")
    assert list(x) == pytest.approx([-1, 1, 0, 0]) and y[0] == y[1] != y[2] == y[3]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["T2-05 (2 seeds)", "T2-03 (2 seeds)"]
    assert "no row has run with more" in texts(seeds_figure([record("T2-07")])).replace(
        "\u00a0", " "
    )


def test_ablation_draws_differences_from_the_usual_choice():
    figure = ablation_figure(ablation_table(ablated()), "title")
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["4C3F, p = 0.3: offset = one-sided"]
    points = [bars.lines[0].get_xdata()[0] for bars in ax.containers]
    assert points == pytest.approx([0, 3, 3, 3])
    crosses = [ln.get_xdata()[0] for ln in ax.get_lines() if ln.get_marker() == "x"]
    assert crosses == pytest.approx([0.0, 61.4 - 61.5, 44.2 - 61.5, 29.1 - 61.5])
    usual = ablation_table(ablated()[:2])
    assert "not run" in texts(ablation_figure(usual, "title"))
