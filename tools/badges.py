"""Write into every notebook what depends on where the kit is published (`make badges`).

    python tools/badges.py notebooks/*.ipynb tests/nb_refs/*.ipynb

Repository and branch stand in pyproject.toml and nowhere else: a fork changes them there. From them
come the Colab badge and the head of the set-up cell, which on Colab fetches the kit and AutoAttack,
the one library that is missing there.
"""

import json
import re
import sys
from pathlib import Path

import environment  # tools/ is on the path: this file is run as a script
import pages

SETUP = """\
# On Colab this fetches the kit; elsewhere it only lets `import cll` find the checkout.
import sys
from subprocess import check_call

if "google.colab" in sys.modules:
    fetch = "test -d cll || git clone -q --depth 1 -b {branch} {url} cll"
    check_call(f"{{fetch}} && pip install -qq '{attack}'", shell=True, cwd="/content")
sys.path[:0] = ["/content/cll", ".", ".."]"""
FIRST, *_, LAST = map(re.escape, SETUP.splitlines())
HEAD = re.compile(f"^{FIRST}.*?{LAST}", re.DOTALL)  # of the cell, whatever it fetches


def badge(name):
    """The badge of a notebook, as Markdown; name: without suffix."""
    site = "https://colab.research.google.com"
    url = f"{environment.repository()}/blob/{environment.branch()}/notebooks/{name}.ipynb"
    opens = url.replace("https://github.com", f"{site}/github")
    return f"[![Open In Colab]({site}/assets/colab-badge.svg)]({opens})"


def setup_cell():
    """The set-up cell, as source."""
    (attack,) = environment.pyproject()["project"]["optional-dependencies"]["attack"]
    return SETUP.format(url=environment.repository(), branch=environment.branch(), attack=attack)


def rewritten(text, name):
    """The JSON text of a notebook, brought up to date; its name without suffix. Raises ValueError
    for a notebook without badge or set-up cell."""
    nb = json.loads(text)
    prose, code = ([c for c in nb["cells"] if c["cell_type"] == k] for k in ("markdown", "code"))
    wanted = (("Colab badges", prose, pages.BADGE, badge(name)),
              ("set-up cells in front", code[:1], HEAD, setup_cell()))  # fmt: skip
    for what, cells, pattern, new in wanted:
        count = 0
        for cell in cells:
            source, times = pattern.subn(lambda _, new=new: new, "".join(cell["source"]))
            cell["source"] = source.splitlines(keepends=True)
            count += times
        if count != 1:
            raise ValueError(f"{name}: {count} {what}, not one")
    return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main(paths):
    changed = 0
    for path in map(Path, paths):
        before = path.read_text(encoding="utf-8")
        try:
            after = rewritten(before, path.stem)
        except ValueError as error:
            sys.exit(f"FAILED badges: {error}")
        changed += after != before
        path.write_text(after, encoding="utf-8")
    where = f"{environment.repository()}, branch {environment.branch()}"
    print(f"badges: {len(paths)} notebooks open from {where}; {changed} rewritten")


if __name__ == "__main__":
    parser = environment.parser(__doc__)
    parser.add_argument("notebooks", nargs="+", help="notebooks to rewrite")
    main(parser.parse_args().notebooks)
