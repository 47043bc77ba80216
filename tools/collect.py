"""Copy finished runs into outputs/reference, check all there, and write what is about them: a
short table in README.md, all columns and the list of the runs in outputs/reference/README.md, and
the model cards.

    python tools/collect.py outputs/paper              # all finished runs of that folder
    python tools/collect.py outputs/paper '*4C3F*'     # those whose names match
    python tools/collect.py                            # nothing new: check, and write the tables

A run is taken if its files agree with each other (`check`) before and after they are made small,
and refused if it is a smoke run, if it was certified by an older version, or if its data are the
user's own and not named as a data set of the paper (LABEL). Runs on such a named copy are committed
as runs on that data set, under that label, so that the notebooks find them.
Weights above a megabyte are kept of rows of the tables alone, one seed each, at full size.
"""

import fnmatch
import json
import shutil
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import cards  # tools/ is on the path: this file is run as a script
import environment
import numpy as np
import pandas as pd

ROOT = Path(environment.ROOT)
sys.path.insert(0, str(ROOT))

import cll
from cll import experiment
from cll.experiment import reference
from cll.experiment.reference import REFERENCE, WEIGHTS, records
from cll.experiment.store import CERTIFIER
from paper.moons import display_moons, moons_table
from paper.records import (
    RADII,
    caption,
    data_source,
    epochs,
    markdown,
    method,
    or_dash,
    plain_name,
    shortened,
)
from paper.tables import comparison_table, display_table

LIMIT, WEIGHTS_LIMIT, SMALL = 120e6, 12e6, 1e6  # bytes: of the folder, of one run's weights
README, LISTING = ROOT / "README.md", REFERENCE / "README.md"
BEGIN, END = "<!-- written by make collect -->\n", "<!-- end of runs -->\n"


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def collect(source, root=REFERENCE):
    """Copy one finished run's folder; returns the new folder. ValueError says why it is refused."""
    record = json.loads((source / "result.json").read_text())
    if record["profile"] == "smoke":
        raise ValueError(f"{source.name}: a smoke run is no reference")
    if record.get("certifier") != CERTIFIER:
        raise ValueError(f"{source.name}: certified by an older version; repeat its command")
    check(source)
    if record["published_epochs"] is None:
        raise ValueError(f"{source.name}: without published_epochs nobody sees a short schedule")
    record = named(record, source)
    weights = source / WEIGHTS
    of_row = record["row"] and record["seed"] == 1 and "size" not in record
    runs = experiment.run_dir(record, root / record["profile"])
    with tempfile.TemporaryDirectory(dir=root) as new:
        new = Path(new) / runs.name
        new.mkdir()
        with np.load(source / "radii.npz") as arrays:
            small = compact(arrays, [float(Fraction(name)) for name in record["cra"]])
        np.savez_compressed(new / "radii.npz", **small)
        (new / "result.json").write_text(json.dumps(record, indent=1))
        curve = pd.read_csv(source / "curve.csv")
        curve.to_csv(new / "curve.csv", index=False, float_format="%.6g")
        if weights.stat().st_size <= (WEIGHTS_LIMIT if of_row else SMALL):
            shutil.copyfile(weights, new / WEIGHTS)
        check(new)
        total = size(root) - (size(runs) if runs.exists() else 0)
        if total > LIMIT:
            raise ValueError(f"{root} would have {total / 1e6:.0f} MB, limit {LIMIT / 1e6:.0f}")
        shutil.rmtree(runs, ignore_errors=True)
        runs.parent.mkdir(parents=True, exist_ok=True)
        new.rename(runs)
    return runs


def compact(radii, distances):
    """The arrays of a run's radii.npz as they are committed: guaranteed radii rounded down to
    float32, classes in the smallest integer type. A sample whose radius is above one of `distances`
    by less than float32 resolves would drop out of that CRA: then the array stays float64."""
    small = {key: radii[key] for key in ("radius", "radius_local", "correct") if key in radii}
    for key in small.keys() - {"correct"}:
        exact = radii[key]
        near = exact.astype(np.float32)
        above = near > exact  # compared in float64
        near[above] = np.nextafter(near[above], np.float32(-np.inf))
        if all(((near > d) == (exact > d)).all() for d in distances):
            small[key] = near
    for key in ("prediction", "target"):
        small[key] = radii[key].astype(np.min_scalar_type(int(radii[key].max())))
    return small


def check(folder):
    """Raise ValueError unless a run's files agree with each other: identity with parameters and
    folder, accuracies with the radii, weights with K."""

    def insist(holds, what):
        if not holds:
            raise ValueError(f"{folder}: {what}")

    record = json.loads((folder / "result.json").read_text())
    params = experiment.Params.model_validate(record["params"])
    insist(params.hash() == record["params_hash"], "its parameters are not those of its hash")
    name = experiment.run_dir(record, "").name
    insist(folder.name == name, "the folder has not the name of its run")
    with np.load(folder / "radii.npz") as arrays:
        radii = dict(arrays)
    correct = radii["correct"]
    insist(len(correct) == record["test_size"], "radii.npz has another number of samples")
    insist(correct.mean() == record["clean"], "radii.npz has another clean accuracy")
    right = radii["prediction"] == radii["target"]
    insist((right == correct).all(), "radii.npz contradicts itself on what is right")
    known = {"cra": "radius", "cra_local": "radius_local", "cra_paper_style": "radius_paper_style"}
    for key, array in known.items():
        if array in radii and key in record:
            distances = [float(Fraction(name)) for name in record[key]]
            cra = cll.cra_curve(radii[array].astype(float), correct, distances).tolist()
            insist(cra == list(record[key].values()), f"{key} is not that of radii.npz")
    if (folder / WEIGHTS).exists() and np.isfinite(record["K_f"]):
        K = cll.lipschitz_matrix(experiment.load_model(folder), "guaranteed").max().item()
        insist(np.isclose(K, record["K_f"], 1e-6, 0), "K of the weights is not that of the run")


def command(folder, record):
    """The shell command that makes the run: that of a parameter file if one has exactly its
    parameters today, else of its own record."""
    plain = reference.command(folder, record)
    for path in sorted((ROOT / "params").glob(f"*/{record['name']}.yaml")):
        given = {"seed": record["seed"], "data": record["params"]["data"]}
        params = experiment.load_params(path, record["profile"], **given)
        if params.hash() == record["params_hash"]:
            file, options = path.relative_to(ROOT), plain.partition("/result.json")[2]
            choice = f"--profile {record['profile']} --seeds {record['seed']}"
            return f"python -m cll {file} {choice}{options}"
    return plain


def named(record, source):
    """The record with a copy of a data set of the paper under that data set's own name."""
    params = experiment.Params.model_validate(record["params"])
    kind, colon, place = params.data.partition(":")
    if not colon:
        return record
    known = {plain_name(name): name for name in ("cifar10", "cifar100", "tiny-imagenet")}
    name, data = known.get(plain_name(params.label)), f"its data are {params.data}"
    if not name:
        raise ValueError(f"{source.name}: {data} and LABEL named no data set of the paper")
    params = params.model_copy(update={"data": name})
    changed = {"params": params.model_dump(mode="json", by_alias=True)}
    changed |= {"params_hash": params.hash(), "source": f"{kind}:{Path(place).name}"}
    return record | changed


def listing(root=REFERENCE):
    """Every committed run as Markdown: what it is, the command that makes it, where it was made."""
    lines = []
    for folder, record in records(root).items():
        trained, together = record.get("trained", record), record["trained_together"]
        revision, _, changes = trained["git_revision"].partition(" ")
        threads = f", {record['threads']} thread{'s' * (record['threads'] != 1)}"
        line = {"run": f"{record['profile']}/{folder.name}", "data": data_source(record)}
        weights = "yes" if (folder / WEIGHTS).exists() else "–"
        line |= {"epochs": epochs(record), "weights": weights}
        line |= {"command": f"`{command(folder, record)}`"}
        line |= {"seconds": f"{record['seconds']:.0f}" + f" (share of {together})" * (together > 1)}
        line |= {"machine": trained["device"] + threads * trained["device"].startswith("cpu")}
        line |= {"torch": record["versions"]["torch"]}
        line |= {"revision": revision[:10] + "+" * bool(changes), "date": trained["date"][:10]}
        lines.append(line)
    used = sum(map(size, records(root)))  # not the pictures, which git does not keep
    total = f"\n{len(lines)} runs, {used / 1e6:.1f} of at most {LIMIT / 1e6:.0f} MB.\n"
    return markdown(pd.DataFrame(lines)) + total


def row_runs(root):
    """Pairs (committed runs of a table row that differ in the seed alone, their comparison_table),
    without those that are `_replaced`."""
    groups = {}
    for record in records(root).values():
        if row := record["row"]:
            same = [record.get(key) for key in ("data", "size", "name", "profile", "epochs")]
            groups.setdefault(json.dumps([row, *same]), []).append(record)
    for _, runs in sorted(groups.items()):
        if not any(_replaced(runs[0], other) for other, *_ in groups.values()):
            row = runs[0]["row"]
            yield runs, comparison_table(runs, f"table{row[1]}", [row])


def _replaced(run, other):
    """Whether another run of its row, data and size is longer and by the same recipe, or by any if
    this one shortens the published schedule."""
    alike = all(run.get(key) == other.get(key) for key in ("row", "data", "size"))
    recipes = [r.get("recipe", "published") for r in (run, other)]
    cut = recipes[0] == "published" and shortened(run)
    return alike and other["epochs"] > run["epochs"] and (cut or recipes[0] == recipes[1])


def slack_runs(root):
    """The committed runs of the paper's two-moons panel."""
    runs = experiment.experiment_params("slack_sweep", "paper", list(range(1, 33)))
    return experiment.finished(runs, root / "paper")


def rows(root=REFERENCE):
    """Every row of the tables with committed runs, and the paper's two-moons panel, as Markdown
    with all columns: printed, ours, in brackets the difference."""
    parts = []
    for runs, table in row_runs(root):
        parts += [markdown(display_table(table)), caption(runs, tightness=True) + "\n"]
    if moons := slack_runs(root):
        about = "two moons, the slack panel of the paper, training points"
        parts += [markdown(display_moons(moons_table(moons))), f"{about} · {caption(moons)}\n"]
    return "\n" + "\n".join(parts) + "\n"


def minutes(runs):
    """CPU minutes of a run's training, the mean; a dash where an early version kept none."""
    mean = np.mean([r.get("cpu_seconds") or np.nan for r in runs]) / 60
    return or_dash(".0f" if mean >= 10 else ".1f", mean)


def summary(root=REFERENCE):
    """A line for each row of the tables, but for networks of reduced size, and each slack of two
    moons with committed runs: ours, by the guaranteed bound, beside the printed numbers."""
    lines, radii = [], list(RADII.values())
    for runs, table in row_runs(root):
        first = runs[0]
        if "size" in first:
            continue
        shown = display_table(table.assign(difference=np.nan))
        shown = shown[["clean %", *map("CRA {} %".format, radii)]].agg(" / ".join, axis=1)
        what = f"{first['model']} on {data_source(first)}, {method(first)}, "
        what += f"ε = {first['epsilon']:g} ({first['row']})"
        what += f": clean / CRA {' / '.join(radii)} %"
        paper = shown.iloc[0] if table["published"].notna().any() else "–"  # above ours
        lines.append((what, epochs(first), minutes(runs), len(runs), shown.iloc[1], paper))
    if moons := slack_runs(root):
        shown = display_moons(moons_table(moons).assign(difference=np.nan)).reset_index()
        for slack in shown.to_dict("records"):
            what = f"two moons, {slack['method']} ε = {slack['ε']}, p = {slack['p']}"
            what, ours = f"{what}: CRA of the training points %", slack["CRA % (train)"]
            same = [r for r in moons if f"{r['p']:g}" == slack["p"]]
            about = epochs(moons[0]), minutes(same), slack["seeds"]
            lines.append((what, *about, ours, slack["paper"]))
    columns = ["run", "epochs", "CPU minutes", "seeds", "ours", "paper"]
    return f"\n{markdown(pd.DataFrame(lines, columns=columns))}\n"


def pages(root=REFERENCE):
    """{page: the text between its marks}."""
    return {README: summary(root), LISTING: rows(root) + listing(root)}


def main():
    parser = environment.parser(__doc__)
    parser.add_argument("results", nargs="?", type=Path, help="a profile's folder, OUT/PROFILE")
    parser.add_argument("names", nargs="*", default=["*"], help="patterns of run folders")
    options, refused = parser.parse_args(), 0
    results = sorted(options.results.glob("runs/*/result.json")) if options.results else []
    for folder in (path.parent for path in results):
        if any(fnmatch.fnmatch(folder.name, pattern) for pattern in options.names):
            try:
                print("collect:", collect(folder).relative_to(ROOT))
            except (OSError, ValueError) as error:
                refused += 1
                print(f"FAILED collect: {error}", file=sys.stderr)
    for folder in records():
        check(folder)
    cards.write()  # before the pages, which say how large all is
    for page, text in pages().items():
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        _, there, after = rest.partition(END)
        if not there:
            raise ValueError(f"{page.name} has no lines {BEGIN.strip()!r} and {END.strip()!r}")
        environment.write(page, f"{before}{BEGIN}{text}{END}{after}")
    print(f"collect: {len(records())} runs checked; wrote the tables of README.md and "
          f"{LISTING.relative_to(ROOT)}, and the model cards")  # fmt: skip
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
