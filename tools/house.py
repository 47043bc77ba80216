"""The house in figures: sizes, functions, and which way imports run (`make house`)."""

import ast
import json
import sys
from pathlib import Path

# at most: lines of folders, files, function bodies, code of a notebook; counts
LIMITS = {"lines": {"cll": 8000, "paper": 3000, "tools": 1650, "benchmarks": 1400, "params": 2400,
                    "README.md": 190}, "functions": {"p90": 29}, "files": 450, "bodies": 60,
          "names bound": 25, "parameters": 8, "notebooks": 110}  # fmt: skip
LARGE = ("cll/certify/file.py", "cll/data/sources.py")  # may have more lines
FLOORS = """cll.kit cll.progress cll.data < cll.losses cll.bounds < cll.layers < cll.architectures
< cll.certify < cll.experiment < cll cll.__main__ < paper < tools benchmarks"""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS.split("<")) for room in rooms.split()}


def imports(name, path, known):
    """The modules of `known` that a module imports, also inside functions. `from cll import bounds`
    imports that module; what is no module comes from the package itself."""
    parents = name.split(".")[: None if path.name == "__init__.py" else -1]
    asked = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            asked |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) + 1 - node.level] if node.level else []
            base = ".".join(above + [node.module] * bool(node.module))
            whole = {f"{base}.{alias.name}" for alias in node.names}
            asked |= whole | ({base} if whole - known else set())
    return (asked & known) - {name}


def graph(root):
    """{module: modules of ours that it imports}; a package's __init__ has the package's name."""
    named = {}
    for path in (path for top in LIMITS["lines"] for path in root.glob(f"{top}/**/*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: imports(name, path, set(named)) for name, path in named.items()}


def arrows(modules):
    """What is wrong with a graph: modules on no floor, imports upward, circles."""
    rooms = {name: ".".join(name.split(".")[: 1 + name.startswith("cll")]) for name in modules}
    wrong = [f"{name} stands on no floor" for name in modules if rooms[name] not in FLOOR]
    reached = {name: set(targets) for name, targets in modules.items()}
    for middle in modules:  # by way of others
        for name in modules:
            reached[name] |= reached[middle] if middle in reached[name] else set()
    for name, target in sorted((name, t) for name, targets in modules.items() for t in targets):
        if FLOOR.get(rooms[target], -1) > FLOOR.get(rooms[name], len(FLOORS)):
            wrong.append(f"{name} imports {target}, which stands above it")
        if name in reached[target]:
            wrong.append(f"{name} imports {target}, which leads back to it")
    return wrong


def figures(root):
    """{what is measured: {name: number}, "imports": what is wrong with them}; root: a Path."""
    measured = {what: {} for what in LIMITS} | {"imports": arrows(graph(root))}
    folders = measured["lines"] = dict.fromkeys([*LIMITS["lines"], "tests"], 0)
    kinds = [f"{top}/**/*.{'yaml' if top == 'params' else 'py'}" for top in folders]
    for path in (path for kind in ["README.md", *kinds] for path in sorted(root.glob(kind))):
        name, text = str(path.relative_to(root)), path.read_text(encoding="utf-8")
        folders[name.partition("/")[0]] += len(text.splitlines())
        if not name.startswith(("cll/", "paper/")):
            continue
        measured["files"][name] = 0 if name in LARGE else len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                key, body = f"{name}:{node.name}:{node.lineno}", node.body
                body = body[bool(ast.get_docstring(node)) :] or body
                measured["bodies"][key] = node.end_lineno - body[0].lineno + 1
                names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
                bound = {n.id for n in names if isinstance(n.ctx, ast.Store)}
                measured["names bound"][key] = len(bound)
                plain = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                if node.name.startswith("_") and not node.name.startswith("__"):
                    measured["parameters"][key] = len({a.arg for a in plain} - {"self", "cls"})
    for path in root.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        kept = [line for line in code.splitlines() if line.strip()[:1] not in ("", "#")]
        measured["notebooks"][path.name] = len(kept)
    sizes = sorted(measured["bodies"].values()) or [0]
    places = {"median": 0.5, "p90": 0.9, "max": 1}
    measured["functions"] = {name: sizes[int(at * (len(sizes) - 1))] for name, at in places.items()}
    return measured


def breaches(root):
    """Every rule that is broken, one line each."""
    measured, wrong = figures(root), []
    for what, limit in LIMITS.items():
        for name, number in measured[what].items():
            most = limit.get(name, number) if isinstance(limit, dict) else limit
            wrong += [f"{what}: {name} {number} > {most}"] * (number > most)
    return wrong + measured["imports"]


if __name__ == "__main__":
    house = Path(__file__).resolve().parent.parent
    for what, named in figures(house).items():
        if what != "imports":
            largest = sorted(named.items(), key=lambda item: -item[1])[:8]
            print(f"{what:12}", ", ".join(f"{name} {number:g}" for name, number in largest))
    print("\n".join(["broken:", *breaches(house)]))
    sys.exit(bool(breaches(house)))
