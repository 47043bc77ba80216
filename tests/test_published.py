"""Where the kit is published stands in pyproject.toml alone; what points there says so where it is
not. How to cite it."""

import re
import subprocess
import sys
import types

import jsonschema
import pytest
import yaml
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import badges  # noqa: E402
import environment  # noqa: E402
import report  # noqa: E402

FORK = "https://github.com/me/fork"
# a place of its own that something claims for the kit
OURS = re.compile(r"colab\.research\.google\.com/github|github\.(?:com|io)/[\w.-]+/cll\b")


@pytest.fixture(params=[None, FORK], ids=["unpublished", "published"])
def address(request, monkeypatch):
    """The address that pyproject.toml would hold."""
    urls = {"urls": {"Repository": request.param}} if request.param else {}
    real = environment.pyproject()
    project = {k: v for k, v in real["project"].items() if k != "urls"} | urls
    given = {"project": project, "tool": {"cll": {"branch": "v1.0"}}}
    monkeypatch.setattr(environment, "pyproject", lambda: given)
    return request.param


def test_files_are_what_the_command_writes():
    written = badges.files()
    assert len(written) > 60 and badges.CITATION in written
    for path, text in written.items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run `make badges`"


def test_every_place_follows_the_address(address):
    for path, text in badges.files().items():
        assert bool(address and address in text) == bool(address), path
        assert address or not OURS.search(text), path
        if path.suffix == ".ipynb":
            folder = "benchmarks" if path.stem == "scaling" else "notebooks"
            opens = f"google.com/github/me/fork/blob/v1.0/{folder}/{path.name})"
            assert (opens in text) == bool(address)
            assert ("the kit has no public address" in text) == (not address)
            assert badges.rewritten(text, path.stem) == text  # finds its own again
    site = report.sources()
    assert (site == f'<a href="{FORK}">Sources</a>') if address else "no public address" in site


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_no_other_file_holds_the_address():
    url = environment.repository()
    listed = subprocess.check_output(["git", "-C", ROOT, "ls-files", "-z"], text=True)
    may = {*badges.files(), ROOT / "pyproject.toml"} if url else {ROOT / "pyproject.toml"}
    for path in (ROOT / name for name in listed.split("\0") if name):
        if path in may or not path.is_file():
            continue
        text = path.read_bytes().decode("utf-8", "ignore")
        assert not OURS.search(text) and not (url and url in text), path


def test_a_notebook_without_a_badge_is_an_error():
    path = ROOT / "notebooks" / "figure3.ipynb"
    lines = path.read_text(encoding="utf-8").splitlines()
    without = "\n".join(line for line in lines if "On Colab: not" not in line and "[![" not in line)
    with pytest.raises(ValueError, match="0 Colab badges, not one"):
        badges.rewritten(without, "figure3")


def test_setup_cell_fetches_the_kit_on_colab_alone_or_asks_for_it(address, monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **how: commands.append((a, how)))
    monkeypatch.setattr(sys, "path", ["rest"])
    exec(badges.setup_cell(), {})
    assert sys.path.pop() == "rest" and not commands
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    if not address:
        with pytest.raises(FileNotFoundError, match="no kit in /content/cll: the first lines of"):
            exec(badges.setup_cell(), {})
        assert "#     !unzip -q /content/cll.zip -d /content && pip install" in badges.setup_cell()
        return
    exec(badges.setup_cell(), {})
    assert sys.path[0] == "/content/cll"
    (((command,), options),) = commands
    assert options == {"shell": True, "cwd": "/content"}  # and a failure is an error
    assert f"git clone -q --depth 1 -b v1.0 {FORK} cll" in command
    assert command.startswith("test -d cll || ") and "pip install -qq 'pyautoattack" in command


def an(**properties):
    """The JSON schema of a mapping with these keys, all of them required, and no other."""
    keys = {"additionalProperties": False, "required": list(properties)}
    return {"type": "object", "properties": properties, **keys}


TEXT, NAMES = {"type": "string", "minLength": 1}, {"family-names", "given-names"}
PAPER = an(
    type={"const": "conference-paper"},
    title=TEXT,
    authors={"type": "array", "minItems": 1, "items": an(**dict.fromkeys(NAMES, TEXT))},
    conference=an(name=TEXT),
    year={"type": "integer"},
    identifiers={"type": "array", "items": an(type={"const": "other"}, value=TEXT)},
    url={"type": "string", "pattern": "^https://"},
)
KIT = an(
    **{"cff-version": {"const": "1.2.0"}, "preferred-citation": PAPER},
    **dict.fromkeys(("message", "title", "version", "license"), TEXT),
    type={"const": "software"},
    authors={"type": "array", "minItems": 1, "items": an(name=TEXT)},
)
KIT["properties"]["repository-code"] = PAPER["properties"]["url"]


def test_the_citation_has_the_form_of_cff_and_is_that_of_the_readme(address):
    """The keys that the format requires or knows, of those that a kit and a paper need."""
    cited = yaml.safe_load(badges.files()[badges.CITATION])
    jsonschema.validate(cited, KIT)
    assert cited.get("repository-code") == address
    project, paper = environment.pyproject()["project"], cited["preferred-citation"]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert cited["authors"] == project["authors"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("{Lipschitz}", "Lipschitz")
    names = [f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]]
    for field, value in (("title", paper["title"]), ("author", " and ".join(names)),
                         ("booktitle", paper["conference"]["name"]), ("year", paper["year"]),
                         ("note", paper["identifiers"][0]["value"])):  # fmt: skip
        assert re.search(rf"{field} +" + re.escape(f"= {{{value}}}"), readme), field
