"""Long work says how far it is and how long it will take; short work says nothing."""

import itertools
import re

import pytest
import tqdm.std
from test_experiment import SHORT

import cll
from cll import experiment
from cll.progress import progress_bar


@pytest.fixture
def headless(monkeypatch):
    monkeypatch.setenv("CLL_HEADLESS", "1")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


@pytest.fixture
def slow(headless, monkeypatch):
    """Every look at the clock is a minute later."""
    minutes = itertools.count()
    monkeypatch.setattr(tqdm.std, "time", lambda: 60 * next(minutes))


def test_short_work_is_silent(headless, capsys):
    with progress_bar(3, "work") as bar:
        for _ in range(3):
            bar.update()
    assert capsys.readouterr().err == ""


def test_long_work_shows_the_time_left(slow, capsys):
    with progress_bar(4, "work", "step") as bar:
        bar.update()
    assert re.search(r"work: +25%.* 1/4 \[\d\d:00<\d\d:00", capsys.readouterr().err)


def test_every_stage_of_a_run_shows_progress(slow, tmp_path, capsys):
    changes = {"epochs": 2, "snapshots": [1], "certify_train": False}
    runs = [experiment.load_params(SHORT | changes, seed=seed) for seed in (1, 2)]
    cll.run_all(runs, tmp_path, stack=1)
    found = set(re.findall(r"(\w+): +\d+%", capsys.readouterr().err))
    assert {"runs", "bounds", "logits", "tightness", "snapshots"} <= found
    stacked = tmp_path / "stacked"
    cll.run_all(runs, stacked)
    assert "certify:" in capsys.readouterr().err
    net = experiment.load_model(experiment.run_dir(runs[0], stacked))
    for work in (
        lambda: cll.certify(net, experiment.load_dataset(runs[0])),
        lambda: cll.layer_bounds(net),
    ):
        work()
        assert re.search(r"bounds: 100%.* (\d+)/\1 ", capsys.readouterr().err)
