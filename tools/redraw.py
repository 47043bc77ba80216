"""Run the notebooks whose outputs are committed. Equal results are equal files: they carry no times
and no paths.

    python tools/redraw.py             # make reference: tables and figures from the committed runs
    python tools/redraw.py figure4     # one of them
    python tools/redraw.py --smoke     # make refs: the references that the notebook tests compare with

From the committed runs nothing is trained; a run that is not there is left out and reads "not run".
The notebooks, their pictures and tables go to outputs/reference/paper. There is one kernel per core,
so that PyTorch is loaded once there and not once per notebook.

A smoke reference is run in an empty outputs folder of its own on one CPU thread, one after the
other, and goes to tests/nb_refs. Pictures are left out: nbval does not compare them, and their bytes
change with every version of matplotlib. The references of the tables hold the few rows of ROWS: make
runs them whole.
"""

import functools
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import environment  # tools/ is on the path: this file is run as a script
import execute

NOTEBOOKS, REFERENCE = execute.ROOT / "notebooks", execute.ROOT / "outputs" / "reference"
SMOKE = execute.ROOT / "tests" / "nb_refs"
# they train what no run is committed of, or the reader's own
OTHERS = {"certify_your_model", "quickstart", "soundness", "train", "train_your_own"}
LAST = "claims"  # reads what the others judged
PICTURES = ("image/png", "image/svg+xml", "application/pdf")
ROWS = {"table1": "T1-07,T1-09", "table2": "T2-08,T2-09,T2-11"}  # notebook: rows that nbval repeats
thread = threading.local()  # each has a kernel, and a list of its process


def names(others=OTHERS):
    """The notebooks that draw from runs, or from nothing; others: what is left out."""
    return sorted({path.stem for path in NOTEBOOKS.glob("*.ipynb")} - set(others))


def executed(name, folder, *given):
    """One notebook, executed in a folder, as a NotebookNode."""
    return execute.execute(NOTEBOOKS / f"{name}.ipynb", Path(folder, name), *given)


def redraw(name):
    """Run one notebook on the committed runs and write it."""
    with tempfile.TemporaryDirectory() as scratch:
        nb = executed(name, scratch, {"profile": "paper"}, None, thread.processes, thread.kernel)
    path = REFERENCE / "paper" / name / f"{name}.ipynb"
    environment.write(path, execute.reproducible(nb))


def smoke(name):
    """Write the smoke reference of one notebook."""
    given = {"profile": "smoke"} | ({"rows": ROWS[name]} if name in ROWS else {})
    with tempfile.TemporaryDirectory() as outputs:
        os.environ["CLL_OUTPUTS"] = outputs
        nb = executed(name, outputs, given)
    for output in (output for cell in nb.cells for output in cell.get("outputs", [])):
        for kind in PICTURES:
            output.get("data", {}).pop(kind, None)
            output.get("metadata", {}).pop(kind, None)
    environment.write(SMOKE / f"{name}.ipynb", execute.reproducible(nb, outputs))


def timed(work, name):
    """(seconds that work(name) took, what went wrong)."""
    began, trouble = time.monotonic(), ""
    try:
        work(name)
    except Exception as error:
        trouble = execute.reason(error)
    return time.monotonic() - began, trouble


def main():
    parser = environment.parser(__doc__)
    parser.add_argument("names", nargs="*", help="notebooks, without suffix; default: all")
    parser.add_argument("--smoke", action="store_true", help="write the references of the tests")
    options = parser.parse_args()
    chosen = options.names or names(() if options.smoke else OTHERS)
    work, count = (smoke, 1) if options.smoke else (redraw, min(os.cpu_count(), len(chosen)))
    os.environ["TQDM_DISABLE"] = "1"  # bars carry times
    if not options.smoke:
        os.environ |= {"CLL_ONLY_FINISHED": "1", "CLL_OUTPUTS": str(REFERENCE)}
    execute.prepare_kernel_environment(jobs=1)
    execute.quiet_libraries(os.devnull)
    os.chdir(NOTEBOOKS)  # once: papermill would change it under another thread
    failed, began, kernels = 0, time.monotonic(), []

    def start():
        thread.processes = []
        thread.kernel = execute.kernel_class(kernels=thread.processes)(kernel_name="python3")
        kernels.append((thread.kernel, thread.processes))

    with ThreadPoolExecutor(count, initializer=start) as pool:
        for group in ([n for n in chosen if n != LAST], [n for n in chosen if n == LAST]):
            results = pool.map(functools.partial(timed, work), group)
            for name, (seconds, trouble) in zip(group, results, strict=True):
                failed += bool(trouble)
                if trouble:
                    print(f"FAILED {name}: {trouble}", file=sys.stderr)
                else:
                    print(f"{name}: {seconds:.1f} s", flush=True)
    for kernel, processes in kernels:
        for process in processes:
            process.kill()
            process.wait()
        kernel.cleanup_connection_file()
    print(f"{len(chosen)} notebooks: {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
