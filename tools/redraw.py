"""Run the notebooks whose outputs are committed. Equal results are equal files: they carry no times
and no paths.

    python tools/redraw.py             # tables and figures from the committed runs: make reference
    python tools/redraw.py figure4     # one of them
    python tools/redraw.py --smoke     # what the notebook tests compare with: make refs

The first write to outputs/reference/<profile>. Nothing is trained; a run that is not there reads
"not run". One kernel per core loads PyTorch once, not once per notebook. The last writes to
tests/nb_refs, each notebook from an empty outputs folder on one CPU thread, without pictures: nbval
does not compare them, and their bytes change with every version of matplotlib.
"""

import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import environment  # tools/ is on the path: this file is run as a script
import execute

NOTEBOOKS, SMOKE = execute.ROOT / "notebooks", execute.ROOT / "tests" / "nb_refs"
REFERENCE = execute.ROOT / "outputs" / "reference"
# they train what no run is committed of, or the reader's own
OTHERS = {"certify_your_model", "quickstart", "train", "train_your_own"}
LAST = "claims"  # reads what the others judged
QUICK = {"figure5", "front", "seeds", "table2"}  # drawn from profile quick, all others from paper
SEEDS = {"table2": {"seeds": [1, 2, 3, 4]}}  # committed beyond those of the profile
PICTURES = ("image/png", "image/svg+xml", "application/pdf")
# notebook: the few rows that nbval repeats; make runs them whole
ROWS = {"table1": "T1-07,T1-09", "table2": "T2-08,T2-09,T2-11"}
thread = threading.local()  # each has a kernel, and a list of its process


def names(others=OTHERS):
    """The notebooks that draw from runs, or from nothing; others: what is left out."""
    return sorted({path.stem for path in NOTEBOOKS.glob("*.ipynb")} - set(others))


def committed(name):
    """Where the notebook that was run on committed runs lies: <profile>/<name>/<name>.ipynb."""
    return REFERENCE / ("quick" if name in QUICK else "paper") / name / f"{name}.ipynb"


def redraw(name):
    """Run one notebook on the committed runs and write it; LAST also leaves claims.json there."""
    path = committed(name)
    parameters = {"profile": path.parent.parent.name} | SEEDS.get(name, {})
    given = parameters, None, thread.processes, thread.kernel
    with tempfile.TemporaryDirectory() as scratch:
        nb = execute.execute(NOTEBOOKS / path.name, Path(scratch, path.name), *given)
    environment.write(path, execute.reproducible(nb))
    if name == LAST:
        path.with_name("claims.json").replace(REFERENCE / "claims.json")


def smoke(name):
    """Write the smoke reference of one notebook."""
    file, given = f"{name}.ipynb", {"profile": "smoke"}
    given |= {"rows": ROWS[name]} if name in ROWS else {}
    with tempfile.TemporaryDirectory() as outputs:
        os.environ["CLL_OUTPUTS"] = outputs
        nb = execute.execute(NOTEBOOKS / file, Path(outputs, file), given)
    for output in (output for cell in nb.cells for output in cell.get("outputs", [])):
        for kind in PICTURES:
            output.get("data", {}).pop(kind, None)
            output.get("metadata", {}).pop(kind, None)
    environment.write(SMOKE / file, execute.reproducible(nb, outputs))


def failed(work, name):
    """Do work(name) and say how long it took or what went wrong; whether it failed."""
    began = time.monotonic()
    try:
        work(name)
    except Exception as error:
        print(f"FAILED {name}: {execute.reason(error)}", file=sys.stderr)
        return True
    print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
    return False


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
    failures, kernels = 0, []

    def start():
        thread.processes = []
        thread.kernel = execute.kernel_class(kernels=thread.processes)(kernel_name="python3")
        kernels.append((thread.kernel, thread.processes))

    with ThreadPoolExecutor(count, initializer=start) as pool:
        for group in ([n for n in chosen if n != LAST], [n for n in chosen if n == LAST]):
            failures += sum(pool.map(failed, [work] * len(group), group))
    for kernel, processes in kernels:
        for process in processes:
            process.kill()
            process.wait()
        kernel.cleanup_connection_file()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
