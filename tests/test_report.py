"""The static site: complete, alone, readable by machines."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import nbformat
import pytest
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "tools"))
import environment  # noqa: E402
import pages  # noqa: E402
import report  # noqa: E402

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Links(HTMLParser):
    """What a page loads and where it leads."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.leads, self.ids, self.images = [], [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.ids.add(a.get("id"))
        if tag == "img":
            self.images.append(a)
        if tag in ("img", "script", "iframe", "source", "audio", "video") and "src" in a:
            self.loads.append(a["src"])
        if tag == "link":
            self.loads.append(a.get("href"))
        if tag == "a":
            self.leads.append(a["href"])


def png(colour, width=900):
    stream = io.BytesIO()
    Image.new("RGB", (width, 300), colour).save(stream, "png")
    return stream.getvalue()


def result(cell, mime, value, **metadata):
    data = {mime: value, "text/plain": "plain"}
    output = nbformat.v4.new_output("execute_result", data, execution_count=1, metadata=metadata)
    cell.outputs.append(output)


@pytest.fixture
def results(tmp_path):
    """A folder of results as `make` leaves it: a notebook with a figure, a table and a formula, one
    with nothing, table 1, and one run."""
    folder = tmp_path / "smoke"
    for name in ("toy", "plain", "table1", "runs/toy-seed1"):
        (folder / name).mkdir(parents=True)
    code = nbformat.v4.new_code_cell("hidden = 'the code'", execution_count=1)
    result(code, "text/html", '<table border="1" class="dataframe"><tr><td>7</td></tr></table>')
    (folder / "toy" / "boundary.png").write_bytes(png("red"))
    encoded = base64.b64encode(png("red")).decode()
    result(code, "image/png", encoded, **{"image/png": {"alt": 'a "red" < area', "width": 400}})
    code.outputs.append(nbformat.v4.new_output("stream", text="one line\n"))
    text = (
        "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        "(https://colab.research.google.com/toy)\n\n# Toy & co\n\n"
        "If $K_{ij}<1$ then `cost = $5` and\n\n$$r=\\frac{f_y-f_j}{K_{yj}}$$\n\nfor $3 or $4."
    )
    cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_markdown_cell("## Parameters")]
    nb = nbformat.v4.new_notebook(cells=[*cells, code])
    nb.metadata["papermill"] = {"duration": 12.4}
    nbformat.write(nb, folder / "toy" / "toy.ipynb")
    empty = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("Nothing to see.")])
    nbformat.write(empty, folder / "plain" / "plain.ipynb")
    nbformat.write(empty, folder / "plain" / "plain.partial.ipynb")
    nbformat.write(empty, folder / "table1" / "table1.ipynb")
    (folder / "table2").mkdir()  # its notebook did not reach the end
    (folder / "table2" / "table2.md").write_text("| unfinished |\n| --- |\n| 1 |\n\nx\n")
    (folder / "table1" / "table1.md").write_text(
        "| row | CRA |\n| --- | --- |\n| T1-01 | 22.4 |\n\nprofile x\n"
    )
    (folder / "table1" / "claims.md").write_text(
        "| claim | verdict |\n| --- | --- |\n| a < b | holds |\n"
    )
    trained = {
        "device": "cpu",
        "git_revision": "0123456789abcdef with local changes",
        "date": "2026-01-02T03:04:05",
    }
    record = {"name": "toy", "seed": 1, "data": "digits", "seconds": 4.2, "trained": trained}
    record |= {"epochs": 3, "published_epochs": 801, "versions": {"torch": "2.6.0"}}
    (folder / "runs" / "toy-seed1" / "result.json").write_text(json.dumps(record))
    return folder


def test_the_site_is_whole_and_asks_nobody(results):
    site = report.build(results).parent
    found = {path.name: Links(path) for path in site.glob("*.html")}
    assert found.keys() == {"index.html", "toy.html", "plain.html", "table1.html", "certify.html"}
    for name, page in found.items():
        for target in page.leads:
            file, _, anchor = target.partition("#")
            if not file.startswith("https://"):
                assert (file or name) in found
                assert not anchor or anchor in found[file or name].ids
        for source in page.loads:
            assert source.startswith("data:") or (site / source).is_file(), source
        assert all(image["alt"] for image in page.images)
        assert "url(" not in pages.PAGE.template and "@import" not in pages.PAGE.template
    front = (site / "index.html").read_text()
    assert found["index.html"].images[0]["alt"] == 'a "red" < area'
    for shown in ("Toy &amp; co", "12 s", "T1-01", "a &lt; b", "holds", "profile x"):
        assert shown in front
    for shown in ("3 of 801", "0123456789 + changes", "2026-01-02", "digits", "2.6.0"):
        assert shown in front
    assert "unfinished" not in front
    with Image.open(site / "toy-boundary.png") as thumbnail:
        assert thumbnail.width == report.THUMBNAIL


def test_a_page_has_formulas_without_scripts_and_no_code(results):
    body = (report.build(results).parent / "toy.html").read_text()
    assert re.findall(r'<math[^>]*display="(\w+)"', body) == ["inline", "block"]
    assert "<mfrac>" in body and "cost = $5" in body and "for $3 or $4." in body
    assert "<script" not in body and "the code" not in body and "colab-badge" not in body
    assert "<h2" not in body  # the heading of the hidden parameters
    assert re.search(r'tabindex="0"><table>\s*<tr><td>7</td>', body)


def test_durations():
    words = ["0 s", "89 s", "1.5 min", "10 min", "60 min", "90 min", "1.5 h", "25 h"]
    seconds = (0.4, 89, 90, 599, 3600, 5399, 5400, 90000)
    assert [environment.duration(value) for value in seconds] == words


def test_without_results_an_error_says_what_to_run(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "report.py", tmp_path / "quick"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not done.stdout
    assert "no finished notebook" in done.stderr and "make figure3" in done.stderr


def console(page, profile):
    """What Chromium says about a page while it loads it: its document, and messages of the console.
    Requests that the page's policy forbids are among these."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    done = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_a_browser_has_nothing_to_complain_about(results, tmp_path):
    for page in sorted(report.build(results).parent.glob("*.html")):
        document, messages = console(page, tmp_path / "profile")
        assert "</main>" in document and not messages


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
@pytest.mark.parametrize("body", ['<img src="https://x.test/a.png">', "<script>1</script>"])
def test_the_policy_stops_scripts_and_requests(body, tmp_path):
    (tmp_path / "page.html").write_text(pages.page("toy", body))
    _, messages = console(tmp_path / "page.html", tmp_path / "profile")
    assert messages and "Content Security Policy" in messages[0]
