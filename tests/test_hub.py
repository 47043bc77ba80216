"""What a checkout offers of the committed image networks: entry points of torch.hub, model cards."""

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import cll
from cll.experiment.reference import WEIGHTS

sys.path.insert(0, str(ROOT / "tools"))
import cards  # noqa: E402

IMAGES = cll.reference.images()
LOAD = """
import json, sys, torch
net = torch.hub.load(sys.argv[1], sys.argv[2], source="local")
x = torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
print(json.dumps([type(net).__name__, net.training, net(x).tolist()]))
"""


def test_hub_loads_a_network_from_anywhere(tmp_path):
    """In a fresh Python that knows nothing of this checkout but its path."""
    python = [sys.executable, "-c", LOAD, str(ROOT), "cifar10_4C3F_CLL"]
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    told = subprocess.run(
        python, cwd=tmp_path, env=bare, check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    kind, training, logits = json.loads(told.splitlines()[-1])
    assert kind == "LipschitzNet" and not training
    x = torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    net = cll.load_reference("cifar10-4C3F-CLL-seed1")
    torch.testing.assert_close(torch.tensor(logits), net(x), rtol=1e-4, atol=1e-4)


def test_every_committed_image_network_has_an_entry(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    import hubconf

    public = {k for k in dir(hubconf) if callable(getattr(hubconf, k)) and k[0] != "_"}
    assert public == set(IMAGES) and "cifar10_4C3F_CLL" in public
    for key, name in IMAGES.items():
        assert (
            key.isidentifier() and f'cll.load_reference("{name}")' in getattr(hubconf, key).__doc__
        )


def test_an_image_network_is_one_that_takes_images():
    names = cll.reference.names()
    for name, folder in names.items():
        if (folder / WEIGHTS).exists():
            shape = json.loads((folder / "result.json").read_text())["input_shape"]
            assert (name in IMAGES.values()) == (len(shape) == 3), name


def test_cards_are_what_the_command_writes():
    written = cards.cards()
    assert len(written) == len(IMAGES) >= 3
    for path, text in written.items():
        assert path.read_text(encoding="utf-8") == text, "run `python tools/cards.py`"


@pytest.mark.parametrize("key", IMAGES)
def test_a_card_says_what_the_record_holds(key):
    folder = cll.reference.names()[IMAGES[key]]
    text = (folder / "README.md").read_text(encoding="utf-8")
    record = json.loads((folder / "result.json").read_text())
    accuracies = record["clean"], *(record["cra"][radius] for radius in record["params"]["radii"])
    assert f"| guaranteed | {' | '.join(f'{100 * a:.1f}' for a in accuracies)} |" in text
    assert hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() in text
    assert record["params_hash"] in text and f"| loss.name | {record['method']} |" in text
    for link in re.findall(r"\]\(([^)]*)\)", text):
        assert (folder / link).exists()
    assert not re.search(r"\bnan\b|None|\{", text)
