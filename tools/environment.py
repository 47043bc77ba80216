"""What the Makefile asks about a Python before it uses it, and what several tools share. No torch
import: each answer costs a few hundredths of a second, and the file parses on any Python 3.

    python tools/environment.py missing run|test|all   # names what is missing; exit 1 if any
    python tools/environment.py profile                # "paper" with a CUDA device, else "quick"
    python tools/environment.py lock                   # write constraints.txt: make lock
"""

import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Distributions whose module has another name.
MODULES = {"pyyaml": "yaml", "scikit-learn": "sklearn", "pytest-xdist": "xdist", "pillow": "PIL"}

LOCK_HEAD = """\
# The versions that the tests ran with, for `make install LOCKED=1`; `make lock` writes them, on the
# oldest Python that the kit supports. What a later Python or another system needs besides is open.
"""


def pyproject():
    """pyproject.toml as a dict."""
    import tomllib  # here, so that Python 3.10 gets the message of `missing`, not an ImportError

    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        return tomllib.load(file)


def repository():
    """URL of the sources, to which `make badges` and the report lead; None while it is not set."""
    return pyproject()["project"].get("urls", {}).get("Repository")


def branch():
    """Branch or tag of the repository that Colab opens."""
    return pyproject()["tool"]["cll"]["branch"]


def requirements(extra):
    """Requirement strings of pyproject.toml for the given extra, base dependencies included."""
    project = pyproject()["project"]
    lines = [*project["dependencies"], f"cll[{extra}]"]
    for line in lines:  # which grows
        if line.startswith("cll["):
            for name in line[len("cll[") : -1].split(","):
                lines += project["optional-dependencies"][name.strip()]
    return list(dict.fromkeys(line for line in lines if not line.startswith("cll[")))


def parser(text):
    """An argument parser that shows the docstring of its tool as it stands."""
    import argparse

    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=text, formatter_class=raw)


def duration(seconds):
    """ "34 s", "2.5 min", "40 min" or "1.7 h"."""
    size, unit = (1, "s") if seconds < 90 else (60, "min") if seconds < 5400 else (3600, "h")
    return f"{seconds / size:.{unit != 's' and seconds < 9.95 * size:d}f} {unit}"


def write(path, text):
    """Write a file (a Path) whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def module(name):
    """The module that a distribution provides."""
    return MODULES.get(name, name.replace("-", "_"))


def missing(extra):
    """What this Python lacks for an extra: a list such as ["papermill", "torch>=2.6 (has 2.3)"]."""
    if sys.version_info < (3, 11):  # noqa: UP036 (the question is asked of any Python)
        return [f"Python>=3.11 (has {sys.version_info[0]}.{sys.version_info[1]})"]
    try:
        from packaging.requirements import Requirement  # matplotlib requires it
    except ImportError:
        return ["packaging"]
    lacking = []
    for line in requirements(extra):
        requirement = Requirement(line)
        try:
            version = importlib.metadata.version(requirement.name) or "0"
            if importlib.util.find_spec(module(requirement.name)) is None:
                lacking.append(requirement.name)
            elif not requirement.specifier.contains(version, prereleases=True):
                lacking.append(f"{line} (has {version})")
        except importlib.metadata.PackageNotFoundError:
            lacking.append(requirement.name)
    return lacking


def locked():
    """{distribution: version} of all that the extras need, and what those need, as this Python has
    it; without local tags of a version, such as +cu128, which no registry has."""
    from packaging.requirements import Requirement

    pins, asked = {}, [Requirement(line) for line in requirements("all")]
    for requirement in asked:  # which grows
        found = importlib.metadata.distribution(requirement.name)
        name = re.sub("[-_.]+", "-", requirement.name).lower()
        pins[name] = found.version.partition("+")[0]
        for needed in map(Requirement, found.requires or ()):
            extras = [{"extra": extra} for extra in ("", *requirement.extras)]
            if needed.marker is None or any(map(needed.marker.evaluate, extras)):
                asked += [needed] * (needed not in asked)
    return pins


def lock():
    """Write constraints.txt. Exits where this is not the oldest Python that the kit supports: a
    release for that one exists for later ones, but not the other way round."""
    oldest = pyproject()["project"]["requires-python"].lstrip(">=")
    if oldest != f"{sys.version_info[0]}.{sys.version_info[1]}":
        sys.exit(f"FAILED lock: write it with Python {oldest}, whose releases later ones have too")
    pins = [f"{name}=={version}\n" for name, version in sorted(locked().items())]
    write(Path(ROOT, "constraints.txt"), LOCK_HEAD + "".join(pins))


def cuda_device():
    """True if a CUDA device is visible and the installed PyTorch, if any, is a CUDA build.

    Asks the driver itself, which honours CUDA_VISIBLE_DEVICES; importing torch would take seconds.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        version = Path(spec.origin).with_name("version.py")
        # a build from source may lay its files out differently: then the driver decides
        if version.exists() and re.search(r"^cuda.*None\s*$", version.read_text(), re.MULTILINE):
            return False
    import ctypes

    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
        asked = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
        return asked and count.value > 0
    except OSError:
        return False


def main(arguments):
    if arguments == ["profile"]:
        print("paper" if cuda_device() else "quick")
        return 0
    if arguments == ["lock"]:
        lock()
        return 0
    if len(arguments) == 2 and arguments[0] == "missing":
        lacking = missing(arguments[1])
        if lacking:
            print(", ".join(lacking))
        return 1 if lacking else 0
    print(__doc__.strip())
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
