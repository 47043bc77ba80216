"""Write the executed smoke references that the notebook tests compare with (`make refs`).

    python tools/references.py notebooks/*.ipynb --into tests/nb_refs

Each notebook runs in an empty outputs folder of its own on one CPU thread, so the references do
not depend on earlier runs, name no path and are byte-identical from run to run. Pictures are left
out: nbval does not compare them, and their bytes change with every version of matplotlib. The
references of the tables hold the few rows of ROWS: make runs them whole.
"""

import os
import sys
import tempfile
from pathlib import Path

import environment  # tools/ is on the path: this file is run as a script
import execute

PICTURES = ("image/png", "image/svg+xml", "application/pdf")
ROWS = {"table1": "T1-07,T1-09", "table2": "T2-08,T2-09,T2-11"}  # notebook: rows that nbval repeats


def write_reference(notebook, folder):
    parameters = {"profile": "smoke"}
    if notebook.stem in ROWS:
        parameters["rows"] = ROWS[notebook.stem]
    with tempfile.TemporaryDirectory() as outputs:
        os.environ["CLL_OUTPUTS"] = outputs
        nb = execute.execute(notebook, Path(outputs, notebook.name), parameters)
    for output in (output for cell in nb.cells for output in cell.get("outputs", [])):
        for kind in PICTURES:
            output.get("data", {}).pop(kind, None)
            output.get("metadata", {}).pop(kind, None)
    environment.write(folder / notebook.name, execute.reproducible(nb, outputs))


def main(arguments=None):
    parser = environment.parser(__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, default=execute.ROOT / "tests" / "nb_refs")
    options = parser.parse_args(arguments)
    os.environ["TQDM_DISABLE"] = "1"  # bars carry times
    execute.prepare_kernel_environment(jobs=1)
    execute.quiet_libraries(os.devnull)
    for notebook in options.notebooks:
        try:
            write_reference(notebook, options.into)
        except Exception as error:
            print(f"FAILED {notebook.stem}: {execute.reason(error)}", file=sys.stderr)
            return 1
        print(f"{notebook.stem}: wrote {execute.shown(options.into / notebook.name)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
