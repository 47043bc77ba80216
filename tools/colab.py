"""Execute notebooks as Google Colab does: on its versions, without papermill or cll installed.

    python tools/colab.py --python .colab/bin/python quickstart figure1

`make colab` calls this with an environment of tests/colab.txt, on whose Python the kernels run. The
notebooks run in a copy of the checkout, with the parameters that they have, so that nothing here is
written or found by accident: the set-up cell alone makes `import cll` work. A cell that raises or
that prints a warning fails.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import environment  # tools/ is on the path: this file is run as a script
import execute


def copy_checkout(to):
    """The files of the checkout, committed or not, without what git ignores."""
    command = ["git", "-C", execute.ROOT, "ls-files", "-z", "--cached", "--others"]
    listed = subprocess.check_output([*command, "--exclude-standard"], text=True)
    for name in listed.split("\0"):
        if name and (execute.ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(execute.ROOT / name, to / name)


def warnings(nb):
    """The warnings that an executed notebook shows, one line each."""
    outputs = (output for cell in nb.cells for output in cell.get("outputs", []))
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    return [line.strip() for line in text.splitlines() if "Warning: " in line]


def run(path, python):
    """Execute one notebook of the copy; returns what is wrong, "" if nothing is."""
    try:
        kernel = execute.kernel_class(python=python)
        return "; ".join(warnings(execute.execute(path, path, kernel=kernel)))
    except Exception as error:
        return execute.reason(error)


def main():
    parser = environment.parser(__doc__)
    parser.add_argument("notebooks", nargs="+", help="names, without folder and suffix")
    parser.add_argument("--python", required=True, help="with what Colab has")
    options = parser.parse_args()
    for name in ("PYTHONPATH", "CLL_HEADLESS", "CLL_OUTPUTS"):
        os.environ.pop(name, None)
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # its debugger would warn of Python 3.13
    execute.quiet_libraries(os.devnull)
    failed, python = 0, Path(options.python).absolute()
    with tempfile.TemporaryDirectory() as folder:
        copy_checkout(Path(folder, "cll"))
        for name in options.notebooks:
            started = time.monotonic()
            problem = run(Path(folder, "cll", "notebooks", f"{name}.ipynb"), python)
            failed += bool(problem)
            if problem:
                print(f"FAILED {name}: {problem}", file=sys.stderr, flush=True)
            else:
                seconds = time.monotonic() - started
                print(f"{name}: runs as on Colab, {seconds:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
