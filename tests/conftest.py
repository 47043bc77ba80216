"""Environment of the tests, set before anything imports torch; kernels of nbval inherit it."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# One thread each: parallel test processes with several threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TQDM_DISABLE"] = "1"
os.environ["CLL_HEADLESS"] = "1"
os.environ.pop("CLL_FRESH", None)
# The checkout under test, in the kernels too, and no kernel of another environment.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(
    os.pathsep
)
os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
os.environ.pop("JUPYTER_PATH", None)

# Results of tests never mix with the user's, and two test processes never share a run folder.
os.environ["CLL_OUTPUTS"] = tempfile.mkdtemp(prefix="cll-tests-")
atexit.register(shutil.rmtree, os.environ["CLL_OUTPUTS"], ignore_errors=True)


# after the lines above, which they read
import torch  # noqa: E402

import cll  # noqa: E402
from cll.experiment.stack import Stack  # noqa: E402
from paper import plane  # noqa: E402


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(n): Ctrl-C in the n-th step of training from now on; the list returned grows by one
    with each step, this one and later ones included."""

    def at(n):
        pass

        step, begun = Stack.step, []

        def interrupted(self, *batch):
            begun.append(None)
            if len(begun) == n:
                raise KeyboardInterrupt
            return step(self, *batch)

        monkeypatch.setattr(Stack, "step", interrupted)
        return begun

    return at


# A busy machine must not fail a property test.
settings.register_profile("cll", deadline=None)
settings.load_profile("cll")


@pytest.fixture(scope="session")
def half_plane():
    """A network that answers 1 to the right of x = 0 and knows its distance exactly: K = 2."""
    net = cll.LipschitzNet(torch.nn.Sequential(torch.nn.Identity()), torch.nn.Linear(2, 2), (2,))
    with torch.no_grad():
        net.head.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
        net.head.bias.zero_()
    return net


@pytest.fixture(scope="session")
def points():
    """Five points of the plane; one is near the boundary of `half_plane`, one on its wrong side."""
    x = torch.tensor([[-1.0, 0.3], [-0.1, 0.0], [0.2, -0.4], [0.5, 0.2], [0.9, 0.1]])
    targets = torch.tensor([0, 0, 1, 1, 0])
    return SimpleNamespace(train_images=x, train_targets=targets)


@pytest.fixture(scope="session")
def flat(half_plane, points):
    """The picture of both."""
    return plane.on_grid(half_plane, points)
