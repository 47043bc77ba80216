"""Execute notebooks as Google Colab does: on its versions, without papermill or cll installed.

    .colab/bin/python tools/colab.py quickstart figure1

`make colab` calls this with an environment of tests/colab.txt. The notebooks run in a copy of the
checkout, with the parameters that they have, so that nothing here is written or found by accident:
the set-up cell alone makes `import cll` work. A cell that raises or that prints a warning fails.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent


def copy_checkout(to):
    """The files of the checkout, committed or not, without what git ignores."""
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(command, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def warnings(nb):
    """The warnings that an executed notebook shows, one line each."""
    outputs = (output for cell in nb.cells for output in cell.get("outputs", []))
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    return [line.strip() for line in text.splitlines() if "Warning: " in line]


def run(path):
    """Execute one notebook of the copy; returns what is wrong, "" if nothing is."""
    nb = nbformat.read(path, as_version=4)
    client = NotebookClient(
        nb, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return f"{error.ename}: {error.evalue}"
    except DeadKernelError as error:
        return str(error)
    return "; ".join(warnings(nb))


def main(names):
    for name in ("PYTHONPATH", "CLL_HEADLESS", "CLL_OUTPUTS", "JUPYTER_PATH"):
        os.environ.pop(name, None)
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # the kernel of this environment
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # its debugger would warn of Python 3.13
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy_checkout(Path(folder, "cll"))
        for name in names:
            started = time.monotonic()
            problem = run(Path(folder, "cll", "notebooks", f"{name}.ipynb"))
            seconds = time.monotonic() - started
            if problem:
                failed += 1
                print(f"FAILED {name}: {problem}", file=sys.stderr, flush=True)
            else:
                print(f"{name}: runs as on Colab, {seconds:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="+", help="names, without folder and suffix")
    sys.exit(main(parser.parse_args().notebooks))
