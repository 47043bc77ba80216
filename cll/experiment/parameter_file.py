"""Parameter files, read as they look, each over its base. Imports no PyTorch: tools/ load it.

YAML 1.1 takes 010 for 8, 1:30 for 90, yes for 1, and of two equal keys the second, all in silence:
such a file is refused. `base: ../moons.yaml` in a file names another, relative to its own folder,
whose values it takes where it says nothing else. A base may have a base.
"""

import re
from pathlib import Path

import yaml

# What may stand there unquoted, by YAML's own name of its kind; any other text is a string.
NUMBER = r"[-+]?((0|[1-9]\d{0,99})(\.\d*)?|\.\d+)([eE][-+]?\d+)?"
OTHERWISE = r"[-+]?(0[xX][\da-fA-F_]+|0[oObB]?[\d_]+|\d[\d._]*_[\d._]*)([eE][-+]?[\d_]+)?"
WRITTEN = {
    "int": r"[-+]?(0|[1-9]\d{0,99})",
    "float": rf"{NUMBER}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "bool": "true|True|TRUE|false|False|FALSE",
    "null": "null|Null|NULL|~",
    "str": rf"(?s)(?!{OTHERWISE}$).*",
}


def read(path, above=()):
    """The mapping of keys to values in a file of UTF-8 text, over that of its base.

    Raises ValueError, in one line that names the file, the key and what to write instead, for what
    is no such mapping or would be misread; FileNotFoundError without a file.
    """
    path = Path(path)
    return over_base(_values(path), path.parent, path, (*above, path.resolve()))


def over_base(values, folder, where, above=()):
    """A mapping over that of the file which its key `base` names, relative to `folder`.

    where: how messages name the mapping. above: the files, resolved, of which this one is a base.
    Raises ValueError, in one line, for a base that is no parameter file or leads back to one above.
    """
    if "base" not in values:
        return values
    base, where = values["base"], f"{where}: base = {values['base']!r}"
    if not isinstance(base, str):
        raise ValueError(f"{where} is not text: write the path of a parameter file")
    path = Path(folder) / base
    if not path.is_file():
        raise ValueError(f"{where}: no file {path}: write a path relative to the folder {folder}")
    if path.resolve() in above:
        raise ValueError(f"{where} is a circle, {path} stands on this file: leave one base out")
    return merge(read(path, above), _without("base", values))


def merge(base, over):
    """`over` on top of `base`: mappings merge key by key, anything else is replaced, lists too.

    A loss of another `name` replaces the base's whole, and what the base's profiles change in that.
    """
    losses = [values.get("loss") for values in (base, over)]
    names = [loss["name"] for loss in losses if isinstance(loss, dict) and "name" in loss]
    if len(names) == 2 and names[0] != names[1]:
        base = _without("loss", base)
        if isinstance(base.get("profiles"), dict):
            blocks = base["profiles"].items()
            base["profiles"] = {name: _without("loss", block) for name, block in blocks}
    merged = base | over
    for key in base.keys() & over.keys():
        if isinstance(base[key], dict) and isinstance(over[key], dict):
            merged[key] = merge(base[key], over[key])
    return merged


def _without(key, values):
    """A mapping without a key; what is no mapping, as it is."""
    mapping = isinstance(values, dict)
    return {name: value for name, value in values.items() if name != key} if mapping else values


def _values(path):
    """What one file holds, its `base` as it stands there."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if re.search("[\0\x85\u2028\u2029]", text):  # the last three break lines unseen
            raise UnicodeError
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _check(node, str(path), "", set())
        values = loader.construct_document(node) if node else None
    except FileNotFoundError:
        raise FileNotFoundError(f"no parameter file {path}") from None
    except UnicodeError:
        raise ValueError(f"{path}: not plain UTF-8 text: save it in that encoding") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a parameter file is a mapping: write `key: value` lines")
    return values


def _check(node, path, key, seen):
    """Refuse what stands below a node of the file, at the dotted `key`, and would be misread."""
    if node is None or id(node) in seen:  # an alias, of what was checked where its anchor stands
        return
    seen.add(id(node))
    where = f"{path}, line {node.start_mark.line + 1}: {key}"
    kind, names = node.tag.removeprefix("tag:yaml.org,2002:"), set()
    if kind == "map" and isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            text = name.value if isinstance(name, yaml.ScalarNode) else f"({name.id})"
            below, line = f"{key}.{text}".lstrip("."), f"line {name.start_mark.line + 1}"
            if name.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise ValueError(f"{path}, {line}: the key {below} is not text: put it in quotes")
            if text == "<<" and isinstance(value, yaml.SequenceNode):  # PyYAMLs disagree on order
                raise ValueError(f"{path}, {line}: {below} merges a list: merge one mapping alone")
            if text in names:
                raise ValueError(f"{path}, {line}: the key {below} stands twice: leave one of them")
            names.add(text)
            _check(value, path, below, seen)
    elif kind == "seq" and isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _check(value, path, f"{key}.{i}", seen)
    elif kind == "null" and node.value == "":
        raise ValueError(f"{where} has nothing after it: write a value, or leave the key out")
    else:
        text = node.value if isinstance(node, yaml.ScalarNode) else node.tag
        quoted = kind == "str" and node.style
        if not quoted and not re.fullmatch(WRITTEN.get(kind, "(?!)"), text):
            raise ValueError(
                f"{where} = {text} would be misread: write numbers as 10, 0.5 or 1e-3, truth as "
                "true or false, and text in quotes"
            )
