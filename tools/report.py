"""Make a static site of everything that has run in a profile: OUT/<profile>/report/index.html.

    python tools/report.py outputs/smoke

The front page has tables, claims, figures and what they were made on; behind it stand a page for
each notebook, and one on which committed networks certify in the browser. No page asks another host
for anything, so that the folder can be mailed, put behind any web server or opened as a file.
"""

import base64
import html
import json
import shutil
import sys
from pathlib import Path
from string import Template

import browser  # tools/ is on the path: this file is run as a script
import environment
import nbformat
import pages
import pandas as pd
from PIL import Image

from paper.records import epochs

THUMBNAIL = 560  # pixels of width, for twice the width at which it is shown


def finished(folder):
    """{name: executed notebook}, of those that ran to the end, in the order of their names."""
    paths = sorted(path for path in folder.glob("*/*.ipynb") if path.stem == path.parent.name)
    return {path.stem: nbformat.read(path, 4) for path in paths}


def section(heading, path):
    """A heading, and as HTML the table and the lines below it of a file by paper.save_table."""
    import mistune

    table, _, notes = path.read_text(encoding="utf-8").partition("\n\n")
    render = mistune.create_markdown(plugins=["table"])
    notes = notes.replace("\n", "\n\n")
    return f"{heading}\n{pages.scrolling(render(table))}\n{render(notes)}"


def tables(folder, notebooks):
    """The tables of the paper."""
    names = sorted(notebooks.keys() & {"table1", "table2"})
    headings = [f'<h2 id="{name}">Table {name[-1]}</h2>' for name in names]
    return "\n".join(map(section, headings, (folder / n / f"{n}.md" for n in names)))


def claims(folder, notebooks):
    """What the paper says and whether the runs show it, of every notebook that judges it."""
    parts = []
    for name in notebooks:
        for path in sorted((folder / name).glob("claims*.md")):
            about = f"{name}{path.stem.removeprefix('claims').replace('_', ', ')}"
            parts.append(section(f'<h3><a href="{name}.html">{about}</a></h3>', path))
    return "\n".join(parts)


def gallery(folder, notebooks, report):
    """Thumbnails of the figures that the notebooks show, with their alt texts."""
    parts = []
    for name, nb in notebooks.items():
        saved = {path.read_bytes(): path for path in (folder / name).glob("*.png")}
        for output in (out for cell in nb.cells for out in cell.get("outputs", [])):
            png = base64.b64decode(output.get("data", {}).get("image/png", ""))
            if png not in saved:
                continue
            title = saved[png].stem
            alt = output["metadata"].get("image/png", {}).get("alt", title)
            file = f"{name}-{title}.png"
            with Image.open(saved[png]) as picture:
                picture.thumbnail((THUMBNAIL, 2 * THUMBNAIL))
                picture.convert("RGB").quantize(128).save(report / file, optimize=True)
            image = f'<img src="{file}" loading="lazy" alt="{html.escape(alt)}">'
            caption = f"<figcaption>{name}: {title}</figcaption>"
            parts.append(f'<figure><a href="{name}.html">{image}</a>{caption}</figure>')
    return f'<div class="gallery">{"".join(parts)}</div>'


def provenance(folder):
    """What was trained, on what, with which code: one row per finished run."""
    rows = []
    for path in sorted(folder.glob("runs/*/result.json")):
        r = json.loads(path.read_text(encoding="utf-8"))
        where = r["trained"]
        row = {"run": r["name"], "seed": r["seed"], "data": r["data"], "epochs": epochs(r)}
        row |= {"seconds": f"{r['seconds']:.0f}", "device": where["device"]}
        revision, _, changes = where["git_revision"].partition(" ")
        row |= {"torch": r["versions"]["torch"], "revision": revision[:10]}
        row["revision"] += " + changes" * bool(changes)
        rows.append(row | {"trained": where["date"][:10]})
    with pd.option_context("display.max_colwidth", None):
        return pages.scrolling(pd.DataFrame(rows).to_html(border=0, index=False))


def contents(notebooks):
    rows = []
    for name, nb in notebooks.items():
        seconds = nb.metadata.get("papermill", {}).get("duration") or 0
        title = html.escape(pages.heading(nb, name))
        rows.append(f'<li><a href="{name}.html">{title}</a> <span class="soft">{name}, '
                    f"{environment.duration(seconds)}</span></li>")  # fmt: skip
    return f"<ul>\n{chr(10).join(rows)}\n</ul>"


def sources():
    """Where the code is, as HTML."""
    url = environment.repository()
    return f'<a href="{url}">Sources</a>' if url else "The sources have no public address yet."


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
    for name, nb in notebooks.items():
        title = pages.heading(nb, name)
        back = '<a href="index.html">All results</a>'
        environment.write(report / f"{name}.html", pages.page(title, pages.notebook_body(nb), back))
    browser.build(report)
    title = f"Certified robust models with CLL: results of profile {folder.name}"
    front = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    body = front.substitute(
        title=title,
        sources=sources(),
        contents=contents(notebooks),
        tables=tables(folder, notebooks),
        claims=claims(folder, notebooks),
        gallery=gallery(folder, notebooks, report),
        provenance=provenance(folder),
    )
    environment.write(report / "index.html", pages.page(title, body))
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
