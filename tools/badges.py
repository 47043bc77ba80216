"""Write anew what depends on where the kit is published (`make badges`).

The public address and its branch stand in pyproject.toml and nowhere else. From them come the Colab
badge and the set-up cell of every notebook, executed ones too, and a line of CITATION.cff. Without
an address no link leads anywhere, and these places say so. On Colab the set-up cell fetches the kit
and AutoAttack, the one library that is missing there; without an address it says what to do.
"""

import json
import re
import sys
from pathlib import Path

import environment  # tools/ is on the path: this file is run as a script

ROOT = Path(environment.ROOT)
WHERE = ("notebooks", "benchmarks", "tests/nb_refs", "outputs/reference/**")
CITATION = ROOT / "CITATION.cff"
COLAB = "https://colab.research.google.com"

PUBLISHED = """\
# On Colab this fetches the kit; elsewhere it only lets `import cll` find the checkout.
import sys
from subprocess import check_call

if "google.colab" in sys.modules:
    fetch = "test -d cll || git clone -q --depth 1 -b {branch} {url} cll"
    check_call(f"{{fetch}} && pip install -qq '{attack}'", shell=True, cwd="/content")
sys.path[:0] = ["/content/cll", ".", ".."]"""
UNPUBLISHED = """\
# The kit has no public address yet from which Colab could fetch it. There, upload a checkout as
# cll.zip (or clone your own into /content/cll), then run this in a cell of its own:
#     !unzip -q /content/cll.zip -d /content && pip install -qq '{attack}'
# Elsewhere this cell only lets `import cll` find the checkout.
import sys
from pathlib import Path

if "google.colab" in sys.modules and not Path("/content/cll/cll").is_dir():
    raise FileNotFoundError("no kit in /content/cll: the first lines of this cell say what to do")
sys.path[:0] = ["/content/cll", ".", ".."]"""
LAST = re.escape(PUBLISHED.splitlines()[-1])
HEAD = re.compile(f"^.*?{LAST}", re.DOTALL)  # of the cell, whatever it fetches
NO_BADGE = "*On Colab: not yet, the kit has no public address.*"
BADGE = re.compile(r"^(\[!\[Open In Colab\]|\*On Colab: ).*$", re.MULTILINE)
SOURCES = re.compile(r"^(# )?repository-code: .*$", re.MULTILINE)


def badge(name):
    """The badge of a notebook, as Markdown, or why it has none; name: without suffix."""
    if not environment.repository():
        return NO_BADGE
    folder = "benchmarks" if (ROOT / "benchmarks" / f"{name}.ipynb").exists() else "notebooks"
    url = f"{environment.repository()}/blob/{environment.branch()}/{folder}/{name}.ipynb"
    opens = url.replace("https://github.com", f"{COLAB}/github")
    return f"[![Open In Colab]({COLAB}/assets/colab-badge.svg)]({opens})"


def setup_cell():
    """The set-up cell, as source."""
    (attack,) = environment.pyproject()["project"]["optional-dependencies"]["attack"]
    url = environment.repository()
    template = PUBLISHED if url else UNPUBLISHED
    return template.format(url=url, branch=environment.branch(), attack=attack)


def sources():
    """The line of CITATION.cff that says where the code is."""
    url = environment.repository()
    return f'repository-code: "{url}"' if url else "# repository-code: no public address yet"


def replaced(text, pattern, new, what):
    """The text with the one match of a pattern replaced; ValueError unless there is one."""
    text, count = pattern.subn(lambda _: new, text)
    if count != 1:
        raise ValueError(f"{count} {what}, not one")
    return text


def rewritten(text, name):
    """The JSON text of a notebook, brought up to date; its name without suffix. Raises ValueError
    for a notebook without badge or set-up cell."""
    nb = json.loads(text)
    heads = {cell["cell_type"]: cell for cell in reversed(nb["cells"])}  # the first of each
    wanted = (("markdown", BADGE, badge(name), "Colab badges"),
              ("code", HEAD, setup_cell(), "set-up cells in front"))  # fmt: skip
    for kind, *how in wanted:
        heads[kind]["source"] = replaced("".join(heads[kind]["source"]), *how).splitlines(True)
    return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def files():
    """{file: its text, brought up to date}. Raises ValueError, which names the file."""
    written, path = {}, CITATION
    try:
        text = path.read_text(encoding="utf-8")
        written[path] = replaced(text, SOURCES, sources(), "lines for the sources")
        for path in (p for where in WHERE for p in sorted(ROOT.glob(f"{where}/*.ipynb"))):
            written[path] = rewritten(path.read_text(encoding="utf-8"), path.stem)
    except ValueError as error:
        raise ValueError(f"{path.relative_to(ROOT)}: {error}") from None
    return written


def main():
    try:
        written = files()
    except ValueError as error:
        sys.exit(f"FAILED badges: {error}")
    changed = {p: text for p, text in written.items() if p.read_text(encoding="utf-8") != text}
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    where = f"{environment.repository() or 'no public address'}, branch {environment.branch()}"
    print(f"badges: {where}; {len(changed)} of {len(written)} files rewritten")


if __name__ == "__main__":
    environment.parser(__doc__).parse_args()
    main()
