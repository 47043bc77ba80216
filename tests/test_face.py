"""`import cll`: what it loads, and what it leaves for the first use."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import cll

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("matplotlib", "pandas", "pydantic", "scipy", "yaml", "torch._dynamo")


def loaded_after(*statements):
    """For each statement, which of HEAVY a fresh Python has loaded when it is done."""
    report = f"print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    lines = ["import sys, json", *(f"{statement}; {report}" for statement in statements)]
    python = [sys.executable, "-c", "\n".join(lines)]
    result = subprocess.run(python, cwd=ROOT, check=True, capture_output=True, text=True)
    return [set(json.loads(line)) for line in result.stdout.splitlines()]


def test_importing_cll_loads_no_heavy_library_and_its_names_are_there_on_first_use():
    torch_alone, with_cll, with_run = loaded_after("import torch", "import cll", "cll.run")
    assert with_cll == torch_alone
    assert "pydantic" in with_run


def test_an_unknown_name_is_an_error_that_names_it():
    with pytest.raises(AttributeError, match="'cll' has no attribute 'nothing'"):
        cll.nothing  # noqa: B018
    assert {"run", "experiment", "certificate"} <= set(dir(cll))
