"""Environment of the tests, set before anything imports torch; kernels of nbval inherit it."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

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


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(n): Ctrl-C in the n-th step of training from now on; the list returned grows by one
    with each step, this one and later ones included."""

    from cll.experiment.stack import Stack  # imports torch

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
