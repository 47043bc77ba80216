"""Write the executed smoke references that the notebook tests compare with (`make refs`).

    python tools/references.py notebooks/*.ipynb --into tests/nb_refs

Each notebook runs in an empty outputs folder of its own on one CPU thread, so the references do
not depend on earlier runs, name no path and are byte-identical from run to run. Pictures are left
out: nbval does not compare them, and their bytes change with every version of matplotlib. The
references of the tables hold the few rows of ROWS: make runs them whole.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import execute
import nbformat

WIDGET = "application/vnd.jupyter.widget-view+json"
STRIPPED = (
    "metadata.papermill metadata.widgets metadata.language_info "
    "cell.metadata.papermill cell.metadata.execution"
)
ROWS = {"table1": "T1-07,T1-09", "table2": "T2-08,T2-09,T2-11"}  # notebook: rows that nbval repeats


def write_reference(notebook, folder):
    with tempfile.TemporaryDirectory() as outputs:
        os.environ["CLL_OUTPUTS"] = outputs
        executed = Path(outputs, notebook.name)
        parameters = {"profile": "smoke"}
        if notebook.stem in ROWS:
            parameters["rows"] = ROWS[notebook.stem]
        nb = execute.execute(notebook, executed, parameters, log=None)
    for cell in nb.cells:
        if "outputs" in cell:  # widgets, such as progress bars, have random ids
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
        for output in cell.get("outputs", []):
            for kind in ("image/png", "image/svg+xml", "application/pdf"):
                output.get("data", {}).pop(kind, None)
                output.get("metadata", {}).pop(kind, None)
    reference = folder / notebook.name
    nbformat.write(nb, reference)
    # renumbers the cell ids too, which papermill draws at random for the cell that it injects
    keep = ["--keep-output", "--keep-count", "--extra-keys", STRIPPED]
    subprocess.run([sys.executable, "-m", "nbstripout", *keep, reference], check=True)
    text = reference.read_text(encoding="utf-8")
    for path in {outputs, str(execute.ROOT), str(Path.home())} - {"/"}:
        if path in text:
            reference.unlink()
            raise execute.Failure(f"its output names the folder {path}: print relative paths")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, default=execute.ROOT / "tests" / "nb_refs")
    options = parser.parse_args(arguments)
    options.into.mkdir(parents=True, exist_ok=True)
    os.environ["TQDM_DISABLE"] = "1"  # bars carry times
    execute.prepare_kernel_environment(jobs=1)
    execute.quiet_libraries(os.devnull)
    for notebook in options.notebooks:
        try:
            write_reference(notebook, options.into)
        except Exception as error:
            text = execute.one_line(getattr(error, "evalue", error))
            kind = getattr(error, "ename", type(error).__name__)
            message = text if isinstance(error, execute.Failure) else f"{kind}: {text}"
            print(f"FAILED {notebook.stem}: {message}", file=sys.stderr)
            return 1
        print(f"{notebook.stem}: wrote {execute.shown(options.into / notebook.name)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
