"""HTML pages made from executed notebooks: one file each, without scripts and without a request to
any other host. Formulas become MathML, which browsers typeset themselves."""

import copy
import html
import os
import re

BADGE = re.compile(r"\[!\[Open In Colab\]\([^)]*\)\]\(([^)]*)\)")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
DISPLAYED = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
INLINE = re.compile(r"(?<![\\$\w])\$(?=\S)([^$\n]*?[^$\n\s\\])\$(?![\d$])")
TABLE = re.compile(r"<table[^>]*>(.*?)</table>", re.DOTALL)
HEADING = re.compile(r"^# +(.+)$", re.MULTILINE)

STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --soft: #59637a; --paper: #fff; --line: #d5dae3;
  --shade: #f4f6f9; --link: #0b57a4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ef; --soft: #a9b2c3; --paper: #12161d;
  --line: #39414f; --shade: #1b212b; --link: #84bdf5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem clamp(0.8rem, 3vw, 2rem) 3rem;
  font: 1rem/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.25; margin: 1.8em 0 0.5em; }
h1 { font-size: 1.7rem; margin-top: 0.6em; }
h2 { font-size: 1.3rem; border-bottom: 1px solid var(--line); padding-bottom: 0.2em; }
a { color: var(--link); }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
pre { overflow-x: auto; background: var(--shade); padding: 0.6em 0.8em; border-radius: 4px;
  font-size: 0.86rem; line-height: 1.4; }
code { font-size: 0.92em; }
math[display="block"] { margin: 0.8em 0; font-size: 1.1em; }
.wide { overflow-x: auto; margin: 0.8em 0; }
table { border-collapse: collapse; font-size: 0.88rem; }
th, td { padding: 0.25em 0.6em; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
td:first-child, tbody th { white-space: nowrap; }
thead th { border-bottom: 2px solid var(--soft); }
.soft { color: var(--soft); }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
.gallery figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: 0.6rem; }
.gallery figcaption { font-size: 0.86rem; margin-top: 0.3rem; }
"""


# Enforced by the browser that shows a page: it can load nothing but its own pictures.
POLICY = "default-src 'none'; img-src 'self' file: data:; style-src 'unsafe-inline'"


def page(title, body, navigation=""):
    """A whole document. title: plain text; body, navigation: HTML."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{f'<nav>{navigation}</nav>' if navigation else ''}\n<main>\n{body}\n</main>\n"
        f"</body>\n</html>\n"
    )


def heading(nb, default):
    """The text of a notebook's first heading."""
    for cell in nb.cells:
        found = HEADING.search(cell.source) if cell.cell_type == "markdown" else None
        if found:
            return found[1].strip()
    return default


def notebook_body(nb):
    """Text, tables and pictures of an executed notebook as HTML, without the code."""
    from nbconvert import HTMLExporter

    nb = copy.deepcopy(nb)
    nb.cells = [cell for cell in nb.cells if cell.source.strip() != "## Parameters"]  # of the form
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = typeset(BADGE.sub(r"[Open in Colab](\1)", cell.source))
    exporter = HTMLExporter(
        template_name="basic",
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )
    body, _ = exporter.from_notebook_node(nb)
    return scrolling(body)


def typeset(markdown):
    """Markdown with its formulas, $...$ and $$...$$, as MathML; code is left as it is."""
    from latex2mathml.converter import convert

    def formula(display):
        return lambda found: convert(" ".join(found[1].split()), display=display)

    parts = CODE.split(markdown)
    for i in range(0, len(parts), 2):
        text = DISPLAYED.sub(lambda m: f"<div>{formula('block')(m)}</div>", parts[i])
        parts[i] = INLINE.sub(formula("inline"), text)
    return "".join(parts)


def scrolling(body):
    """Tables and output that scroll sideways on a narrow screen, also by keyboard."""
    opening = '<div class="wide" role="group" aria-label="table" tabindex="0"><table>'
    body = TABLE.sub(rf"{opening}\1</table></div>", body)
    return body.replace("<pre>", '<pre role="group" aria-label="output" tabindex="0">')


def write(path, text):
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
