"""The table of expected times is made of measured rows."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import times  # noqa: E402


def test_readme_shows_what_was_measured():
    text = times.README.read_text(encoding="utf-8")
    shown = text.partition(times.BEGIN)[2].partition(times.END)[0]
    assert shown == times.table(times.read()), "run `make times ITEMS=`"


def test_rows_are_of_notebooks_that_exist():
    names = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {row["notebook"] for row in times.read()} <= names


def test_durations():
    seconds = (None, 0.4, 89, 90, 599, 3600, 5399, 5400, 90000)
    words = ["–", "0 s", "89 s", "1.5 min", "10 min", "60 min", "90 min", "1.5 h", "25 h"]
    assert [times.shown(value) for value in seconds] == words


def test_a_machine_has_a_column_and_a_failure_has_no_row(tmp_path, monkeypatch, capsys):
    readme, seconds = tmp_path / "README.md", {"figure3": 5.0, "figure1": 100.0}
    readme.write_text(f"before\n{times.BEGIN}old\n{times.END}after\n")
    monkeypatch.setattr(times, "README", readme)
    monkeypatch.setattr(times, "TIMES", tmp_path / "times.csv")
    monkeypatch.setattr(times, "measure", lambda name, options: seconds.get(name))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["times.py", *arguments])
        return times.main()

    assert run("figure3", "figure1", "--profile", "smoke", "--device", "cpu", "--jobs", "1") == 0
    assert run("figure3", "--profile", "smoke", "--device", "cpu", "--jobs", "2") == 0
    lines = {line.split(" | ")[0]: line for line in readme.read_text().splitlines()}
    assert list(lines)[:2] == ["before", times.BEGIN.strip()] and list(lines)[-1] == "after"
    head = lines["| notebook"].strip("| ").split(" | ")[1:]
    assert [column.partition("), ")[2] for column in head] == ["1 core", "2 cores", "", ""]
    assert [column.partition(":")[0] for column in head] == ["smoke", "smoke", "quick", "paper"]
    assert lines["| figure3"] == "| figure3 | 5 s | 5 s | – | – |"
    assert lines["| figure1"] == "| figure1 | 1.7 min | – | – | – |"
    del seconds["figure1"]
    assert run("figure1", "--profile", "smoke", "--device", "cpu", "--jobs", "1") == 1
    assert "FAILED times: figure1" in capsys.readouterr().err
    assert [row["notebook"] for row in times.read()] == ["figure3", "figure3"]


def test_readme_needs_its_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(times, "README", tmp_path / "README.md")
    monkeypatch.setattr(times, "TIMES", tmp_path / "times.csv")
    times.README.write_text("no marks")
    with pytest.raises(ValueError, match="README.md has no lines"):
        times.write([])
