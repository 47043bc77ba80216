"""How every picture looks and is saved."""

import json

from exhibits import moons_record, radii, record

from paper import style
from paper.formulas import calibrated_logistic, loss_curves
from paper.moons import figure1, figure4, slack_figure
from paper.own import cra_figure
from paper.tables import cra_comparison


def test_every_axis_of_data_is_labelled(flat):
    figures = [
        calibrated_logistic(),
        loss_curves({"a": (0.5, 0.01)}, "computed"),
        figure1([moons_record()], [flat]),
        figure4([moons_record()], [flat]),
        slack_figure([moons_record()], [flat]),
        cra_figure(radii(), record()),
        cra_comparison([radii()], [record()]),
    ]
    for figure in figures:
        assert figure.axes[0].get_ylabel()
        assert all(ax.get_xlabel() for ax in figure.axes if ax.get_subplotspec().is_last_row())


def test_saved_pictures_carry_alt_text_and_are_reproducible(tmp_path):
    pictures = [style.save(calibrated_logistic(), tmp_path / str(i) / "f", "S") for i in "ab"]
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
