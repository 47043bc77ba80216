"""What an installation takes: constraints.txt, and the container for editors."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

sys.path.insert(0, str(ROOT / "tools"))
import environment  # noqa: E402

PIN = re.compile(r"([a-z0-9]+(?:-[a-z0-9]+)*)==([0-9]+(?:\.[0-9]+)*(?:\.post[0-9]+)?)")


def pins():
    """{distribution: version} of constraints.txt, every line of which is a comment or a pin."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [PIN.fullmatch(line) for line in lines if not line.startswith("#")]
    assert all(found), "names and released versions only"
    names = [pin[1] for pin in found]
    assert names == sorted(set(names)) and not {"cll", "pip"} & set(names)
    return {pin[1]: pin[2] for pin in found}


def test_constraints_hold_every_dependency_within_its_bound():
    pinned, extras = pins(), environment.pyproject()["project"]["optional-dependencies"]
    lines = {line for extra in extras for line in environment.requirements(extra)}
    assert len(lines) > 20
    for requirement in map(Requirement, lines):
        assert pinned[requirement.name] in requirement.specifier, f"{requirement}: `make lock`"


def test_the_lock_has_what_is_needed_in_versions_that_registries_know(monkeypatch):
    """Not what is installed beside, nor an extra that nobody asks for."""
    versions = {"top": "2.14.1+cu128", "Mid_dle": "1.0.post1", "low": "3", "beside": "4"}
    needs = {"top": ["Mid_dle[more]>=1", 'beside; sys_platform == "none"'], "low": ["top"]}
    needs["Mid_dle"] = ['low; extra == "more"', 'beside; extra == "less"']
    there = {n: SimpleNamespace(version=v, requires=needs.get(n)) for n, v in versions.items()}
    monkeypatch.setattr(importlib.metadata, "distribution", there.get)
    monkeypatch.setattr(environment, "requirements", {"all": ["top>=2"]}.get)
    assert environment.locked() == {"top": "2.14.1", "mid-dle": "1.0.post1", "low": "3"}


def test_only_the_oldest_python_writes_the_lock(tmp_path, monkeypatch):
    project = {"project": {"requires-python": ">={}.{}".format(*sys.version_info[:2])}}
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "pyproject", lambda: project)
    monkeypatch.setattr(environment, "locked", lambda: {"b": "1", "a": "2"})
    environment.lock()
    text = (tmp_path / "constraints.txt").read_text()
    assert text == environment.LOCK_HEAD + "a==2\nb==1\n"
    project["project"]["requires-python"] = ">=3.2"
    with pytest.raises(SystemExit, match="FAILED lock: write it with Python 3.2,"):
        environment.lock()


def test_the_container_has_a_python_that_the_kit_supports_and_installs_it():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    version = re.fullmatch(r"mcr\.microsoft\.com/devcontainers/python:(3\.\d+)", container["image"])
    supported = SpecifierSet(environment.pyproject()["project"]["requires-python"])
    assert version[1] in supported
    dry = ["make", "-n", "-C", ROOT, f"PYTHON={sys.executable}"]
    command = container["postCreateCommand"].split()
    alone = {"PATH": os.environ["PATH"]}  # without LOCKED and what else this test was started with
    assert command[0] == "make"
    assert not subprocess.run([*dry, *command[1:]], env=alone).returncode
    assert "ms-toolsai.jupyter" in container["customizations"]["vscode"]["extensions"]
