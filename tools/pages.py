"""HTML pages made from executed notebooks: one file each, without scripts and without a request to
any other host. Formulas become MathML, which browsers typeset themselves."""

import copy
import html
import re
from pathlib import Path
from string import Template

BADGE = re.compile(r"\[!\[Open In Colab\]\([^)]*\)\]\(([^)]*)\)")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
DISPLAYED = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
INLINE = re.compile(r"(?<![\\$\w])\$(?=\S)([^$\n]*?[^$\n\s\\])\$(?![\d$])")
TABLE = re.compile(r"<table[^>]*>(.*?)</table>", re.DOTALL)
HEADING = re.compile(r"^# +(.+)$", re.MULTILINE)

PAGE = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def page(title, body, navigation=""):
    """A whole document. title: plain text; body, navigation: HTML."""
    navigation = f"<nav>{navigation}</nav>" if navigation else ""
    return PAGE.substitute(title=html.escape(title), body=body, navigation=navigation, style=STYLE)


def opening(nb, default):
    """The text of a notebook's first heading, and the paragraph below it as HTML."""
    import mistune

    for cell in nb.cells:
        found = HEADING.search(cell.source) if cell.cell_type == "markdown" else None
        if found:
            paragraph = cell.source[found.end() :].strip().partition("\n\n")[0]
            return found[1].strip(), mistune.html(typeset(paragraph)).strip()
    return default, ""


def notebook_body(nb):
    """Text, tables and pictures of an executed notebook as HTML, without the code."""
    from nbconvert import HTMLExporter

    nb = copy.deepcopy(nb)
    nb.cells = [cell for cell in nb.cells if cell.source.strip() != "## Parameters"]  # of the form
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = typeset(BADGE.sub(r"[Open in Colab](\1)", cell.source))
    hidden = ("input", "input_prompt", "output_prompt", "anchor_links")
    exporter = HTMLExporter(template_name="basic", **{f"exclude_{part}": True for part in hidden})
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
