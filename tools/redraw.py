"""Redraw tables and figures from the committed runs (`make reference`); nothing is trained.

    python tools/redraw.py             # all of them
    python tools/redraw.py figure4     # one

Leaves the executed notebooks, pictures and tables under outputs/reference/paper/. A run that is not
there is left out and reads "not run". Cells run by IPython in this process's children, without a
kernel, so that PyTorch is loaded once per core and not once per notebook. The files carry no times
and no paths: equal results are equal files.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import environment  # tools/ is on the path: this file is run as a script
import nbformat
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell

ROOT = Path(environment.ROOT)
REFERENCE = ROOT / "outputs" / "reference"
# they train what no run is committed of, or the reader's own
OTHERS = {"certify_your_model", "quickstart", "soundness", "train", "train_your_own"}
LAST = "claims"  # reads what the others judged


def names():
    """The notebooks that draw from runs, or from nothing."""
    found = (path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    return sorted(set(found) - OTHERS)


class Stream:
    """sys.stdout or sys.stderr of a cell, in its outputs."""

    def __init__(self, name):
        self.name = name

    def write(self, text):
        last = Shell.outputs[-1] if Shell.outputs else {}
        if last.get("name") == self.name:
            last["text"] += text
        elif text:
            Shell.outputs.append(nbformat.v4.new_output("stream", name=self.name, text=text))

    def flush(self):
        pass


class Results(DisplayHook):
    def __call__(self, result=None):
        if result is not None:
            data, metadata = self.shell.display_formatter.format(result)
            more = {"metadata": metadata, "execution_count": Shell.count}
            Shell.outputs.append(nbformat.v4.new_output("execute_result", data, **more))


class Displays(DisplayPublisher):
    def publish(self, data, metadata=None, **options):
        Shell.outputs.append(nbformat.v4.new_output("display_data", data, metadata=metadata or {}))


class Shell(InteractiveShell):
    """IPython that leaves what a cell shows in Shell.outputs, in order."""

    outputs, count = [], 0

    def __init__(self):
        super().__init__(displayhook_class=Results, display_pub_class=Displays)
        self.history_manager.enabled = False

    def run(self, cell):
        """Run a code cell and fill in its outputs; raises what it raises."""
        Shell.outputs, Shell.count = [], Shell.count + 1
        before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = Stream("stdout"), Stream("stderr")
        try:
            self.run_cell(cell.source).raise_error()
        finally:
            sys.stdout, sys.stderr = before
        cell.outputs, cell.execution_count = Shell.outputs, Shell.count


def redraw(name):
    """Run one notebook on the committed runs and write it; returns (seconds, what went wrong)."""
    began = time.monotonic()
    nb = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    at = next(i for i, c in enumerate(nb.cells) if "parameters" in c.metadata.get("tags", []))
    given = nbformat.v4.new_code_cell('profile = "paper"', id="injected-parameters")
    given.metadata["tags"] = ["injected-parameters"]
    nb.cells.insert(at + 1, given)
    main = sys.modules["__main__"]  # which the shell replaces
    shell, Shell.count = Shell(), 0
    try:
        for cell in nb.cells:
            if cell.cell_type == "code" and cell.source.strip():
                shell.run(cell)
    except Exception as error:
        return time.monotonic() - began, f"{type(error).__name__}: {error}"
    finally:
        sys.modules["__main__"] = main
    text = nbformat.writes(nb) + "\n"
    for folder in {str(ROOT), str(Path.home())} - {"/"}:
        if folder in text:
            return time.monotonic() - began, f"its output names the folder {folder}"
    (REFERENCE / "paper" / name).mkdir(parents=True, exist_ok=True)
    (REFERENCE / "paper" / name / f"{name}.ipynb").write_text(text, encoding="utf-8")
    return time.monotonic() - began, ""


def start():
    """A child: as a kernel in notebooks/ starts, with all that notebooks import."""
    os.chdir(ROOT / "notebooks")
    sys.path.insert(0, str(ROOT))
    import cll  # noqa: F401


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="notebooks, without suffix; default: all")
    chosen = parser.parse_args().names or names()
    os.environ |= {"CLL_ONLY_FINISHED": "1", "CLL_OUTPUTS": str(REFERENCE), "CLL_HEADLESS": "1"}
    os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    failed, began = 0, time.monotonic()
    with ProcessPoolExecutor(min(os.cpu_count(), len(chosen)), initializer=start) as pool:
        for group in ([n for n in chosen if n != LAST], [n for n in chosen if n == LAST]):
            for name, (seconds, trouble) in zip(group, pool.map(redraw, group), strict=True):
                failed += bool(trouble)
                if trouble:
                    print(f"FAILED {name}: {' '.join(trouble.split())}", file=sys.stderr)
                else:
                    print(f"{name}: {seconds:.1f} s", flush=True)
    print(f"reference: {time.monotonic() - began:.0f} s, outputs/reference/paper")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
