"""Redraw tables and figures from the committed runs (`make reference`); nothing is trained.

    python tools/redraw.py             # all of them
    python tools/redraw.py figure4     # one

Leaves the executed notebooks, pictures and tables under outputs/reference/paper/. A run that is not
there is left out and reads "not run". There is one kernel per core, so that PyTorch is loaded once
there and not once per notebook. The files carry no times and no paths: equal results are equal
files.
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

REFERENCE = execute.ROOT / "outputs" / "reference"
# they train what no run is committed of, or the reader's own
OTHERS = {"certify_your_model", "quickstart", "soundness", "train", "train_your_own"}
LAST = "claims"  # reads what the others judged
SETTINGS = {"CLL_ONLY_FINISHED": "1", "TQDM_DISABLE": "1"}
thread = threading.local()  # each has a kernel, and a list of its process


def names():
    """The notebooks that draw from runs, or from nothing."""
    notebooks = (path.stem for path in (execute.ROOT / "notebooks").glob("*.ipynb"))
    return sorted(set(notebooks) - OTHERS)


def redraw(name):
    """Run one notebook on the committed runs and write it; returns (seconds, what went wrong)."""
    began, source = time.monotonic(), execute.ROOT / "notebooks" / f"{name}.ipynb"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            given = {"profile": "paper"}, None, thread.processes, thread.kernel
            text = execute.reproducible(execute.execute(source, Path(scratch, name), *given))
        environment.write(REFERENCE / "paper" / name / f"{name}.ipynb", text)
    except Exception as error:
        return time.monotonic() - began, execute.reason(error)
    return time.monotonic() - began, ""


def main():
    parser = environment.parser(__doc__)
    parser.add_argument("names", nargs="*", help="notebooks, without suffix; default: all")
    chosen = parser.parse_args().names or names()
    os.environ |= SETTINGS | {"CLL_OUTPUTS": str(REFERENCE)}
    execute.prepare_kernel_environment(jobs=1)
    execute.quiet_libraries(os.devnull)
    os.chdir(execute.ROOT / "notebooks")  # once: papermill would change it under another thread
    failed, began, kernels = 0, time.monotonic(), []

    def start():
        thread.processes = []
        thread.kernel = execute.kernel_class(kernels=thread.processes)(kernel_name="python3")
        kernels.append((thread.kernel, thread.processes))

    with ThreadPoolExecutor(min(os.cpu_count(), len(chosen)), initializer=start) as pool:
        for group in ([n for n in chosen if n != LAST], [n for n in chosen if n == LAST]):
            for name, (seconds, trouble) in zip(group, pool.map(redraw, group), strict=True):
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
    print(f"reference: {time.monotonic() - began:.0f} s, outputs/reference/paper")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
