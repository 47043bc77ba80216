"""Make a static site of everything that has run in a profile: OUT/<profile>/report/index.html.

    python tools/report.py outputs/smoke

The front page shows the paper's exhibits in the paper's order, then the other notebooks: what each
ran on above its numbers, the published values beside ours. Behind it stand a page for each
notebook, and one on which committed networks certify in the browser. No page asks another host for
anything, so that the folder can be mailed, put behind any web server or opened as a file.
"""

import base64
import collections
import html
import io
import json
import re
import shutil
import sys
from pathlib import Path

import browser  # tools/ is on the path: this file is run as a script
import environment
import hero
import nbformat
import pages
import pandas as pd
from PIL import Image

from paper import sweeps, tables
from paper.claims import read_claims
from paper.records import CLASSES, epochs, plain_name

PAPER = "figure1 figure2 figure3 table1 table2 figure4 figure5".split()  # in the paper's order
BESIDE = "slack_sweep aol_mapping convergence lambda_sweep temperature choose_eps_p seeds".split()
HEADINGS = {
    "paper": "The paper's figures and tables",
    "supplement": "From its poster and supplement",
    "beyond": "Beyond the paper",
}
KNOWN_DATA = {"twomoons", *map(plain_name, CLASSES)}  # which the paper used
LINKED = ("certify_your_model", "quickstart", "claims", "figure3", "soundness")  # from the top
SOURCES = Path(environment.ROOT) / "notebooks"
NONE = "no finished run"
MARKS = (
    '<p class="soft">In brackets: the difference from the paper. ?: not legible in its sources.</p>'
)
CAPTION = re.compile(rf"^(?:profile .+|computed, not trained|{NONE})$", re.MULTILINE)
DATA = re.compile(r" · data ([^·\n]+)")


def finished(folder):
    """{name: executed notebook}, of those that ran to the end: the paper's order, then by name."""
    paths = [path for path in folder.glob("*/*.ipynb") if path.stem == path.parent.name]
    order = {name: i for i, name in enumerate(PAPER + BESIDE)}
    paths.sort(key=lambda path: (order.get(path.stem, len(order)), path.stem))
    return {path.stem: nbformat.read(path, 4) for path in paths}


def group(name):
    return "paper" if name in PAPER else "supplement" if name in BESIDE else "beyond"


def captions(folder, nb):
    """What a notebook's numbers were made on: lines of its tables' files and of what it printed."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md"))]
    texts += [out.get("text", "") for cell in nb.cells for out in cell.get("outputs", [])]
    found = set(CAPTION.findall("\n".join(texts)))
    whole = [c for c in found if not any(c != other and other.startswith(c) for other in found)]
    return sorted(c for c in whole if c != NONE or found == {NONE})


def other_data(captions):
    """Names of the data in captions that the paper did not use, parts of its data among them."""
    named = ", ".join(map(str.strip, DATA.findall("\n".join(captions)))).split(", ")
    part = " classes)"  # as `records.data_source` ends for some of the classes
    return {n for n in named if n and (n.endswith(part) or plain_name(n) not in KNOWN_DATA)}


def picture(nb, path):
    """Write the first picture that a notebook shows; returns it as HTML, "" where it shows none."""
    for output in (out for cell in nb.cells for out in cell.get("outputs", [])):
        if png := output.get("data", {}).get("image/png"):
            about = output.metadata.get("image/png", {})
            with Image.open(io.BytesIO(base64.b64decode(png))) as image:
                width = about.get("width", image.width)
                size = f'width="{width}" height="{round(width * image.height / image.width)}"'
                image.convert("RGB").quantize(128).save(path, optimize=True)
            alt = html.escape(about.get("alt", path.stem))
            image = f'<img src="{path.name}" {size} loading="lazy" alt="{alt}">'
            return f'<a class="picture" href="{path.name}">{image}</a>'
    return ""


def table(frame, **options):
    with pd.option_context("display.max_colwidth", None):
        return pages.scrolling(frame.to_html(border=0, index=False, **options))


def rows(comparison):
    """Table 1 or 2 as HTML: ours, guaranteed, over the published values, with the data that a row
    ran on; then rows that have not run. comparison: the frame of `tables.comparison_table`."""
    data = comparison.drop_duplicates("row_id").set_index("row_id")
    data = data["data"].fillna(data["dataset"]).map(html.escape)
    shown = tables.display_table(comparison)
    source = shown.index.get_level_values("source")
    ours = shown[source.str.endswith(", guaranteed")].droplevel("source")
    printed = shown[~source.str.startswith("here")].droplevel("source")
    both = ours + '<br><span class="soft">paper ' + printed.loc[ours.index] + "</span>"
    both = both.drop(columns="seeds").assign(seeds=ours["seeds"])

    def named(frame):
        names = [f'{method}, {model}<br><span class="soft">{row}, {data[row]}</span>'
                 for row, _, model, method in frame.index]  # fmt: skip
        frame.insert(0, "loss, network", names)
        return table(frame, escape=False)

    parts = [named(both) + MARKS] if len(both) else []
    rest = printed.drop(index=ours.index, columns="seeds")
    if len(rest):
        summary = f"<summary>Not run here: {len(rest)} rows</summary>"
        parts.append(f"<details{' open' * both.empty}>{summary}{named(rest)}</details>")
    return "\n".join(parts)


def judged(claims):
    """What the paper says and whether the runs show it, as HTML. claims: lines of `read_claims`."""
    ran = claims[claims["verdict"] != "not run"]
    parts = []
    if len(ran):
        shown = table(ran[["claim", "paper", "here", "verdict"]])
        shown = re.sub(r"<td>(holds|does not)", r'<td class="\1">\1', shown)
        parts.append(shown.replace('class="wide"', 'class="wide claims"'))
    if more := len(claims) - len(ran):
        parts.append(f'<p class="soft">Not run: {more} of {len(claims)} tests.</p>')
    return "\n".join(parts)


def numbers(folder):
    """The table that the paper prints as this exhibit, ours beside it, as HTML; "" of another."""
    if folder.name in ("table1", "table2"):
        return rows(pd.read_csv(folder / f"{folder.name}.csv", dtype={"data": str}))
    if folder.name != "figure5":
        return ""
    gains = sweeps.display_gains(pd.read_csv(folder / "gains.csv"))
    return table(gains.sort_index().reset_index(names=["value", "source"]))


def exhibit(folder, nb, report, claims):
    """A notebook on the front page, as HTML: heading, what it is about, what it ran on, then its
    numbers, picture and verdicts. folder: its own. claims: its lines of `read_claims`."""
    name, about = folder.name, captions(folder, nb)
    title, lead = pages.opening(nb, name)
    title = f'<a href="{name}.html">{html.escape(title)}</a>'
    if others := ", ".join(sorted(other_data(about))):
        title += f' <span class="other">on {html.escape(others)}, not the paper\'s data</span>'
    seconds = nb.metadata.get("papermill", {}).get("duration")
    lines = [html.escape(line) for line in about]
    lines += [f"computed in {environment.duration(seconds)}"] if seconds else []
    parts = [f'<section class="exhibit" id="{name}">\n<h3>{title}</h3>', lead]
    parts += [f'<p class="caption">{"<br>".join(lines)}</p>', numbers(folder)]
    if about != [NONE]:
        beside = f"<div>{judged(claims)}</div>" if len(claims) else ""
        parts.append(f'<div class="beside">{picture(nb, report / f"{name}.png")}{beside}</div>')
    return "\n".join([*filter(None, parts), "</section>"])


def exhibits(folder, notebooks, report):
    """All notebooks under their headings, and which of the paper's are missing, as HTML."""
    claims, groups = read_claims(folder), collections.defaultdict(list)
    for name, nb in notebooks.items():
        own = claims[claims["notebook"] == name]
        groups[group(name)].append(exhibit(folder / name, nb, report, own))
    missing = ", ".join(f"<code>make {name}</code>" for name in PAPER if name not in notebooks)
    if missing:
        groups["paper"].append(f'<p class="soft">Not in this report: {missing}.</p>')
    parts = []
    for key, heading in HEADINGS.items():
        if groups[key]:
            parts += [f'<h2 id="{key}">{heading}</h2>\n<div class="{key}">', *groups[key], "</div>"]
    return "\n".join(parts)


def verdicts(path):
    """How many of the paper's claims hold, from the summary of claims.ipynb if there is one."""
    if not path.exists():
        return ""
    counts = pd.read_csv(path)["verdict"].value_counts()
    words = {"holds": "hold", "holds so far": "hold so far", "does not hold": "do not hold"}
    words |= {"does not hold so far": "do not so far", "not run": "have not been run"}
    said = ", ".join(
        f"{counts[verdict]} {words[verdict]}" for verdict in words if verdict in counts
    )
    return f"Of {counts.sum()} claims {said}."


def link(name, notebooks):
    """Where to read a notebook, as HTML: its page, or the command that runs it."""
    if name in notebooks:
        title, _ = pages.opening(notebooks[name], name)
        return f'<a href="{name}.html">{html.escape(title)}</a>'
    title, _ = pages.opening(nbformat.read(SOURCES / f"{name}.ipynb", 4), name)
    return f"{html.escape(title)}: <code>make {name}</code>"


def provenance(folder):
    """What was trained, on what, with which code: a frame, one line per finished run."""
    lines = []
    for path in sorted(folder.glob("runs/*/result.json")):
        r = json.loads(path.read_text(encoding="utf-8"))
        where = r["trained"]
        line = {"run": r["name"], "seed": r["seed"], "data": r["data"], "epochs": epochs(r)}
        line |= {"seconds": f"{r['seconds']:.0f}", "device": where["device"]}
        revision, _, changes = where["git_revision"].partition(" ")
        line |= {"torch": r["versions"]["torch"], "revision": revision[:10]}
        line["revision"] += " + changes" * bool(changes)
        lines.append(line | {"trained": where["date"][:10]})
    return pd.DataFrame(lines)


def sources():
    """Where the code is, as HTML."""
    url = environment.repository()
    return f'<a href="{url}">Sources</a>' if url else "The sources have no public address yet."


def front(folder, notebooks, report):
    """The front page as HTML."""
    runs = provenance(folder)
    jumps = [f'<a href="#{name}">{name[:-1].capitalize()} {name[-1]}</a>'
             for name in notebooks if name in PAPER]  # fmt: skip
    others = set().union(*(other_data(captions(folder / n, nb)) for n, nb in notebooks.items()))
    notice = (
        f'<p class="notice">In this report {html.escape(", ".join(sorted(others)))} stand in for '
        "data of the paper, as the headings say: such numbers show that the machinery works, not "
        "what the paper found.</p>"
    )
    text = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return pages.typeset(text).format(
        **{name: link(name, notebooks) for name in LINKED},
        profile=html.escape(folder.name),
        sources=sources(),
        hero=hero.figure(),
        jumps=", ".join(jumps) or "none here yet",
        verdicts=verdicts(folder / "claims" / "summary.csv"),
        notice=notice if others else "",
        exhibits=exhibits(folder, notebooks, report),
        runs=len(runs),
        provenance=table(runs),
    )


def build(folder):
    """Write the site of the results in `folder` (OUT/<profile>); returns the front page's path.
    Raises ValueError where no notebook has finished."""
    folder = Path(folder)
    notebooks = finished(folder)
    if not notebooks:
        raise ValueError(f"no finished notebook in {folder}: run one first, e.g. make figure3")
    report = folder / "report"
    shutil.rmtree(report, ignore_errors=True)
    report.mkdir()
    print(f"report: writing {len(notebooks) + 2} pages, some seconds for each", flush=True)
    for name, nb in notebooks.items():
        title, _ = pages.opening(nb, name)
        back = f'<a href="index.html#{name}">All results</a>'
        environment.write(report / f"{name}.html", pages.page(title, pages.notebook_body(nb), back))
    browser.build(report)
    title = f"Certified robust models with CLL: results of profile {folder.name}"
    environment.write(report / "index.html", pages.page(title, front(folder, notebooks, report)))
    return report / "index.html"


def main():
    parser = environment.parser(__doc__)
    parser.add_argument("folder", help="OUT/<profile>, which holds a folder for each notebook")
    options = parser.parse_args()
    try:
        path = build(options.folder)
    except (ValueError, OSError) as error:
        sys.exit(f"FAILED report: {error}")
    size = sum(file.stat().st_size for file in path.parent.iterdir()) / 2**20
    print(f"report: wrote {path} ({len(list(path.parent.glob('*.html')))} pages, {size:.1f} MiB)")


if __name__ == "__main__":
    main()
