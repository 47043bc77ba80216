"""Write the parameters of one notebook as YAML, and touch the file only when a value changed.

    python tools/parameters.py notebooks/table2.ipynb outputs/quick/table2/params.yaml \
        --profile quick --seeds 1-3

The values are those of params/<profile>.yaml, then those given here; keys that the notebook's
parameters cell does not declare are left out. make calls this before every notebook: an unchanged
file means that a finished notebook is not run again.
"""

import ast
import json
import runpy
import sys
from pathlib import Path

import environment  # tools/ is on the path: this file is run as a script
import yaml

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = {"params_file": "PARAMS"}  # of make; others are in capitals there
OPTIONS = {  # of make and of tools/sweep.py
    "seeds": "1,2,3 or 1-9; empty: those of the profile",
    "rows": "rows of table1 or table2, such as T2-05,T2-07; empty: all",
} | dict.fromkeys(("data", "label", "outputs"), "as for python -m cll")
# without the rest of cll, which takes seconds to import
read = runpy.run_path(str(ROOT / "cll/experiment/parameter_file.py"))["read"]


def cells_of(notebook):
    """The cells of a notebook (a path), as dicts."""
    return json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]


def declared(notebook):
    """{name: default} of the parameters cell of a notebook (a path), in order of appearance.

    Raises ValueError unless exactly one cell is tagged `parameters` and holds only assignments of
    literals: papermill would otherwise set values that nothing reads, without an error.
    """
    cells = cells_of(notebook)
    tagged = [c for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{notebook}: {len(tagged)} cells are tagged 'parameters', not one")
    defaults = {}
    for statement in ast.parse("".join(tagged[0]["source"])).body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        line = f"{notebook}: parameters cell: {ast.unparse(statement)!r}"
        if not isinstance(target, ast.Name) or len(statement.targets) > 1:
            raise ValueError(f"{line} is not `name = literal`")
        try:
            defaults[target.id] = ast.literal_eval(statement.value)
        except ValueError:
            raise ValueError(f"{line} is not a literal") from None
    return defaults


def read_names(notebook):
    """The names that a notebook's code reads: it may declare more than it uses.

    Code that asks for globals(), or that holds more than Python, reads all that is declared.
    """
    code = [cell["source"] for cell in cells_of(notebook) if cell["cell_type"] == "code"]
    try:
        tree = ast.parse("\n".join(map("".join, code)))
    except SyntaxError:
        return set(declared(notebook))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    names = {node.id for node in nodes if isinstance(node.ctx, ast.Load)}
    return set(declared(notebook)) if "globals" in names else names


def unread(notebook, given):
    """The values given for a notebook, {name: value}, that it does not read, as make has them:
    "SEEDS=1-3, ROWS=T2-05". A device is read wherever something is computed."""
    names = read_names(notebook) | {"device", "outputs"}
    names |= {"seeds"} if "seed" in names else set()
    lost = {key: value for key, value in given.items() if value and key not in names}
    return ", ".join(f"{VARIABLES.get(key, key.upper())}={value}" for key, value in lost.items())


def parse_seeds(text):
    """[1, 2, 3, 7] of "1-3,7"; None of "" (the seeds of the profile)."""
    seeds, limits = [], f"at most 1000 of them, below {2**32}"
    try:
        for word in text.replace(",", " ").split():
            first, dash, last = word.partition("-")
            several = range(int(first), int(last if dash else first) + 1)
            if len(several) > 1000 or several.stop > 2**32:
                raise ValueError
            seeds += several
    except (ValueError, OverflowError):
        raise ValueError(f"SEEDS={text}: write 1,2,3 or 1-9, {limits}") from None
    if text.strip() and not seeds:
        raise ValueError(f"SEEDS={text}: names no seed; write 1,2,3 or 1-9")
    return list(dict.fromkeys(seeds)) or None


def resolve(notebook, profile, given, seeds=None):
    """The parameters to pass to a notebook (a path): {name: value}, all of them declared there.
    seeds: a list of them, or None."""
    names = declared(notebook)
    values = read(ROOT / "params" / f"{profile}.yaml")
    values |= {"profile": profile} | {key: value for key, value in given.items() if value}
    if seeds and "seeds" in names:
        values["seeds"] = seeds
    elif seeds and "seed" in names:
        if len(seeds) > 1:
            listed = ",".join(map(str, seeds))
            raise ValueError(f"SEEDS={listed}: {Path(notebook).stem} makes one run; name one seed")
        values["seed"] = seeds[0]
    return {key: value for key, value in values.items() if key in names}


def absolute_source(data):
    """npz:FILE and folder:FOLDER as seen from here: the notebook runs in a folder of its own."""
    kind, colon, path = data.partition(":")
    if kind in ("npz", "folder") and path:
        return f"{kind}{colon}{Path(path).expanduser().resolve()}"
    return data


def write_if_changed(path, text):
    """Write text to path atomically, unless that is what the file holds already."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        environment.write(path, text)


def main(arguments=None):
    parser = environment.parser(__doc__)
    parser.add_argument("notebook")
    parser.add_argument("out", type=Path, help="the YAML file to write")
    parser.add_argument("--profile", required=True, help="smoke, quick or paper")
    file = {"params-file": "a run's YAML file, for train.ipynb"}
    texts = OPTIONS | file | {"device": "empty: as in params/<profile>.yaml"}
    for name, text in texts.items():
        parser.add_argument(f"--{name}", default="", help=text)
    text = "variables of make that are meant for this notebook alone; default: all"
    parser.add_argument("--asked", help=text)
    options = parser.parse_args(arguments)
    asked = {name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name in texts}
    given = {key: value for key, value in asked.items() if key != "seeds"}
    given["data"] = absolute_source(given["data"])
    if options.asked is not None:
        known = options.asked.lower().replace("params", "params_file").split()
        asked = {name: value for name, value in asked.items() if name in known}
    try:
        seeds = parse_seeds(options.seeds)
        if lost := unread(options.notebook, asked):
            raise ValueError(f"{lost} is not read by this notebook: leave it out")
        if options.params_file and not Path(options.params_file).is_file():
            raise ValueError(f"PARAMS={options.params_file}: no such file")
        values = resolve(options.notebook, options.profile, given, seeds)
        write_if_changed(options.out, yaml.safe_dump(values, sort_keys=False))
    except (OSError, ValueError) as error:
        print(f"FAILED {Path(options.notebook).stem}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
