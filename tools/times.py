"""Measure how long notebooks take (`make times`), and write the table of expected times.

    python tools/times.py figure1 figure4 --profile smoke

Each notebook runs alone in a new, empty outputs folder, so that no finished run shortens it. One
row per notebook, profile and machine goes to benchmarks/times.csv, and the table in README.md is
made from that file; without names only the table is. A notebook that fails has no row.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import environment  # tools/ is on the path: this file is run as a script

from cll.experiment import provenance

ROOT = Path(environment.ROOT)
TIMES = ROOT / "benchmarks" / "times.csv"
README = ROOT / "README.md"
BEGIN, END = "<!-- written by make times -->\n", "<!-- end of times -->\n"
PROFILES = ("smoke", "quick", "paper")
COLUMNS = ("notebook", "profile", "seconds", "cores", "device", "date", "revision")
KEY = ("notebook", "profile", "device", "cores")


def read():
    """The rows of benchmarks/times.csv, as dicts of strings."""
    if not TIMES.exists():
        return []
    with open(TIMES, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(rows):
    """Rows to benchmarks/times.csv, sorted, and the table made from them to README.md."""
    rows = sorted(rows, key=lambda row: [row[key] for key in KEY])
    with open(TIMES, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    environment.write_between(README, BEGIN, END, table(rows))


def table(rows):
    """Notebooks by profiles as Markdown, with a column for each machine that ran a profile."""
    names = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    head, columns = ["notebook"], []
    for profile in PROFILES:
        machines = {}
        for row in rows:
            if row["profile"] == profile:
                own = machines.setdefault(machine(row), {})
                own[row["notebook"]] = float(row["seconds"])
        for named, seconds in sorted(machines.items()) or [("", {})]:
            head.append(profile + named)
            columns.append(seconds)
    lines = [head, ["---"] + ["---:"] * len(columns)]
    lines += [[name, *(shown(seconds.get(name)) for seconds in columns)] for name in names]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine(row):
    """ ": cpu (x86_64), 2 cores", to follow a profile; a GPU is named alone."""
    cores = f", {row['cores']} core{'s' * (row['cores'] != '1')}"
    return f": {row['device']}{cores * row['device'].startswith('cpu')}"


def shown(seconds):
    """ "34 s", "2.5 min", "40 min" or "1.7 h"; a dash where nothing was measured."""
    if seconds is None:
        return "–"
    size, unit = (1, "s") if seconds < 90 else (60, "min") if seconds < 5400 else (3600, "h")
    return f"{seconds / size:.{unit != 's' and seconds < 9.95 * size:d}f} {unit}"


def measure(name, options):
    """Seconds of one notebook in an empty outputs folder; None if it failed, which was said."""
    notebook = ROOT / "notebooks" / f"{name}.ipynb"
    python, tools = [sys.executable], ROOT / "tools"
    with tempfile.TemporaryDirectory() as outputs:
        out = Path(outputs, options.profile, name)
        given = ["--profile", options.profile, "--device", options.device, "--data", options.data]
        given += ["--label", options.label, "--outputs", outputs]
        given += ["--params-file", options.params_file if name == "train" else ""]
        given += ["--asked", ""]  # not every notebook reads all of these
        parameters = [tools / "parameters.py", notebook, out / "params.yaml", *given]
        if subprocess.run(python + parameters).returncode:
            return None
        execution = [tools / "execute.py", notebook, out, "--params", out / "params.yaml"]
        started = time.monotonic()
        done = subprocess.run(python + [*execution, "--jobs", options.jobs])
        return None if done.returncode else time.monotonic() - started


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="notebooks, without suffix")
    parser.add_argument("--profile", required=True, choices=PROFILES)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    for name in ("data", "label", "params-file", "jobs"):
        parser.add_argument(f"--{name}", default="", help="as in make")
    options = parser.parse_args()

    rows, failed = read(), []
    if options.names:
        sys.path.insert(0, str(ROOT))
        pass  # takes seconds: not for the table alone

        gpu = options.device != "cpu" and environment.cuda_device()
        now = provenance("cuda" if gpu else "cpu")
        revision, _, changes = now["git_revision"].partition(" ")
    for name in options.names:
        seconds = measure(name, options)
        if seconds is None:
            failed.append(name)
        row = {
            "notebook": name,
            "profile": options.profile,
            "seconds": "" if seconds is None else f"{seconds:.1f}",
            "cores": options.jobs or os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count()),
            "device": now["device"],
            "date": now["date"][:10],
            "revision": revision[:10] + "+" * bool(changes),
        }
        rows = [old for old in rows if any(old[key] != row[key] for key in KEY)]
        rows += [row] * (seconds is not None)
        write(rows)  # after each, so that an interrupted call keeps what it measured
    write(rows)
    print("times: wrote benchmarks/times.csv and the table in README.md")
    if failed:
        print(f"FAILED times: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
