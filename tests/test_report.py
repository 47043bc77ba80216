"""The static site: complete, alone, readable by machines."""

import base64
import html
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
from exhibits import moons_record, record
from PIL import Image

from paper import claims, records, tables

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


def save(folder, name, heading, *cells):
    """Write a notebook as `make` leaves it."""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(heading), *cells])
    nb.metadata["papermill"] = {"duration": 12.4}
    (folder / name).mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, folder / name / f"{name}.ipynb")


def save_exhibits(folder):
    """Table 1 with one row, on digits, and figure 4 with one run, on two moons."""
    digits = record("T1-04", data="digits", size={"width": 0.25}, input_shape=(3, 22, 22))
    moons = moons_record(epsilon=0.15, cra=1.0)
    for name, run in (("table1", digits), ("figure4", moons)):
        save(folder, name, f"# The heading of {name}")
        verdicts = claims.judge(name, [run])
        records.save_table(verdicts, verdicts, folder / name / "claims", records.caption([run]))
    frame = tables.comparison_table([digits], "table1")
    about = records.caption([digits], tightness=True)
    shown = tables.display_table(frame)
    records.save_table(frame.set_index("row_id"), shown, folder / "table1" / "table1", about)


@pytest.fixture
def results(tmp_path):
    """A folder of results as `make` leaves it: a notebook with a figure, a table and a formula, one
    with nothing, two of the paper's exhibits, and one run."""
    folder = tmp_path / "smoke"
    save_exhibits(folder)
    code = nbformat.v4.new_code_cell("hidden = 'the code'", execution_count=1)
    result(code, "text/html", '<table border="1" class="dataframe"><tr><td>7</td></tr></table>')
    encoded = base64.b64encode(png("red")).decode()
    result(code, "image/png", encoded, **{"image/png": {"alt": 'a "red" < area', "width": 400}})
    code.outputs.append(nbformat.v4.new_output("stream", text="one line\n"))
    text = (
        "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        "(https://colab.research.google.com/toy)\n\n# Toy & co\n\n"
        "If $K_{ij}<1$ then `cost = $5` and\n\n$$r=\\frac{f_y-f_j}{K_{yj}}$$\n\nfor $3 or $4."
    )
    save(folder, "toy", text, nbformat.v4.new_markdown_cell("## Parameters"), code)
    save(folder, "plain", "Nothing to see.")
    shutil.copy(folder / "plain" / "plain.ipynb", folder / "plain" / "plain.partial.ipynb")
    (folder / "table2").mkdir()  # its notebook did not reach the end
    (folder / "table2" / "table2.md").write_text("| unfinished |\n| --- |\n| 1 |\n\nx\n")
    trained = {
        "device": "cpu",
        "git_revision": "0123456789abcdef with local changes",
        "date": "2026-01-02T03:04:05",
    }
    run = {"name": "toy", "seed": 1, "data": "digits", "seconds": 4.2, "trained": trained}
    run |= {"epochs": 3, "published_epochs": 801, "versions": {"torch": "2.6.0"}}
    (folder / "runs" / "toy-seed1").mkdir(parents=True)
    (folder / "runs" / "toy-seed1" / "result.json").write_text(json.dumps(run))
    return folder


def test_the_site_is_whole_and_asks_nobody(results):
    site = report.build(results).parent
    found = {path.name: Links(path) for path in site.glob("*.html")}
    names = {"toy.html", "plain.html", "table1.html", "figure4.html"}
    assert found.keys() == names | {"index.html", "certify.html"}
    for name, page in found.items():
        for target in page.leads:
            file, _, anchor = target.partition("#")
            if not file.startswith("https://"):
                assert (file or name) in found or (site / file).is_file()
                assert not anchor or anchor in found[file or name].ids
        for source in page.loads:
            assert source.startswith("data:") or (site / source).is_file(), source
        assert all(image["alt"] for image in page.images)
        assert "url(" not in pages.PAGE.template and "@import" not in pages.PAGE.template
    assert names <= set(found["index.html"].leads)
    front = (site / "index.html").read_text()
    assert found["index.html"].images[0]["alt"] == 'a "red" < area'
    for shown in ("Toy &amp; co", "computed in 12 s", "T1-01", "make figure5"):
        assert shown in front
    for shown in ("3 of 801", "0123456789 + changes", "2026-01-02", "digits", "2.6.0"):
        assert shown in front
    assert "unfinished" not in front
    with Image.open(site / "toy.png") as picture:
        assert picture.size == (900, 300)


def test_exhibits_stand_in_the_papers_order_with_captions_above_their_numbers(results):
    front = report.build(results).read_text(encoding="utf-8")
    sections = dict(re.findall(r'<section class="exhibit" id="(\w+)">(.*?)</section>', front, re.S))
    assert list(sections) == ["table1", "figure4", "plain", "toy"]
    order = [*report.PAPER, *report.BESIDE]
    assert [name for name in order if name.startswith(("figure", "table"))] == (
        "figure1 figure2 figure3 table1 table2 figure4 figure5".split()
    )
    for name, path in (("table1", "table1.md"), ("figure4", "claims.md")):
        about = (results / name / path).read_text(encoding="utf-8").strip().rpartition("\n")[2]
        heading, numbers = sections[name].split(f'<p class="caption">{html.escape(about)}<br>')
        assert "<td" not in heading and "<td" in numbers
        assert ("on digits, not the paper's data</span></h3>" in heading) == (name == "table1")
    ours = r"CLL, 8C2F<br>[^>]*>T1-04, digits<.*?77\.6<br>[^>]*>paper 39\.8<"
    assert re.search(ours, sections["table1"], re.S)
    kept = "<td>100</td>\n      <td>100.00</td>"  # at the true margin, the paper's and ours
    assert kept in sections["figure4"]


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


PHONE = """<iframe width="375" height="700" srcdoc="PAGE"></iframe><script>
document.querySelector("iframe").onload = (event) => {
  const all = event.target.contentDocument.documentElement;
  const cut = [all, ...all.querySelectorAll("p, h3, figcaption, li, summary")].filter((e) =>
    e.scrollWidth > e.clientWidth || e.matches(".caption") && e.scrollHeight > e.clientHeight);
  document.title = "cut: " + cut.map((e) => e.outerHTML.slice(0, 80));
};</script></main>"""


def console(page, profile):
    """What Chromium says about a page while it loads it: its document, and messages of the console.
    Requests that the page's policy forbids are among these."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += ["--virtual-time-budget=60000"]  # until scripts wait for nothing
    done = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_part_of_the_papers_data_is_other_data():
    caption = "profile quick · data {} · 1 seed"
    named = "cifar10 (recovered)", "digits", "tiny-imagenet", "tiny-imagenet (20 of 200 classes)"
    others = report.other_data([caption.format(", ".join(named))])
    assert others == {"digits", "tiny-imagenet (20 of 200 classes)"}


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_a_browser_has_nothing_to_complain_about(results, tmp_path):
    for page in sorted(report.build(results).parent.glob("*.html")):
        document, messages = console(page, tmp_path / "profile")
        assert "</main>" in document and not messages


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_a_phone_shows_every_caption_whole(results, tmp_path):
    front = report.build(results)
    text = front.read_text(encoding="utf-8").replace("http-equiv=", "name=")  # scripts may run
    (front.parent / "phone.html").write_text(
        PHONE.replace("PAGE", html.escape(text)), encoding="utf-8"
    )
    document, _ = console(front.parent / "phone.html", tmp_path / "profile")
    assert re.search("<title>(.*?)</title>", document, re.S)[1] == "cut: "


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
@pytest.mark.parametrize("body", ['<img src="https://x.test/a.png">', "<script>1</script>"])
def test_the_policy_stops_scripts_and_requests(body, tmp_path):
    (tmp_path / "page.html").write_text(pages.page("toy", body))
    _, messages = console(tmp_path / "page.html", tmp_path / "profile")
    assert messages and "Content Security Policy" in messages[0]
