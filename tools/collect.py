"""Copy finished runs into outputs/reference, check all there, and write the tables about them.

    python tools/collect.py outputs/paper              # all finished runs of that folder
    python tools/collect.py outputs/paper '*4C3F*'     # those whose names match
    python tools/collect.py                            # nothing new: check, and write the tables

A run is taken if its files agree with each other (`check`) before and after they are made small,
and refused if it is a smoke run, if it was certified by an older version, or if its data are the
user's own and not named as a data set of the paper (LABEL). Runs on such a named copy are committed
as runs on that data set, under that label, so that the notebooks find them.
Weights above a megabyte are kept of rows of the tables alone, one seed each.
"""

import fnmatch
import json
import shutil
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import environment  # tools/ is on the path: this file is run as a script
import numpy as np
import pandas as pd

ROOT = Path(environment.ROOT)
sys.path.insert(0, str(ROOT))

import cll  # noqa: E402
from cll import experiment
from cll.experiment import reference
from cll.experiment.reference import REFERENCE, WEIGHTS, records
from cll.experiment.store import CERTIFIER
from paper.moons import display_moons, moons_table
from paper.records import data_source, markdown, shortened
from paper.tables import comparison_table, display_table

# noqa: E402

LIMIT, WEIGHTS_LIMIT, SMALL = 120e6, 12e6, 1e6  # bytes: of the folder, of one run's weights
README, LISTING = ROOT / "README.md", REFERENCE / "README.md"
BEGIN, END = "<!-- written by make collect -->\n", "<!-- end of runs -->\n"


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def collect(source, root=REFERENCE, seeds=1):
    """Copy one finished run's folder; returns the new folder. ValueError says why it is refused.

    seeds: how many seeds of a table row keep weights above SMALL.
    """
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
    bytes_, row = weights.stat().st_size, record["row"] and record["seed"] <= seeds
    keep = bytes_ <= SMALL or (row and bytes_ <= WEIGHTS_LIMIT)
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
        if keep:
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
    float32, classes in the smallest integer type.

    A sample whose radius is above one of `distances` by less than float32 resolves would drop out
    of that CRA: then the array stays float64.
    """
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
    insist(
        folder.name == experiment.run_dir(record, "").name, "the folder has not the name of its run"
    )
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
        insist(
            np.isclose(K, record["K_f"], rtol=1e-6, atol=0),
            "K of the weights is not that of the run",
        )


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
    known = {name.replace("-", ""): name for name in ("cifar10", "cifar100", "tiny-imagenet")}
    label = params.label.partition("(")[0].strip().lower().replace("-", "")
    if label not in known:
        raise ValueError(
            f"{source.name}: its data are {params.data} and LABEL named no data set of the paper"
        )
    params = params.model_copy(update={"data": known[label]})
    changed = {"params": params.model_dump(mode="json", by_alias=True)}
    changed |= {"params_hash": params.hash(), "source": f"{kind}:{Path(place).name}"}
    return record | changed


def listing(root=REFERENCE):
    """Every committed run as Markdown: what it is, the command that makes it, where it was made."""
    head = ("run", "data", "epochs", "weights", "command", "seconds", "machine", "torch")
    head += ("revision", "date")
    lines = [head, ("---",) * len(head)]
    for folder, record in records(root).items():
        trained = record.get("trained", record)
        revision, _, changes = trained["git_revision"].partition(" ")
        together = record["trained_together"]
        threads = f", {record['threads']} thread{'s' * (record['threads'] != 1)}"
        lines.append(
            (
                f"{record['profile']}/{folder.name}",
                data_source(record),
                epochs(record),
                "yes" if (folder / WEIGHTS).exists() else "–",
                f"`{command(folder, record)}`",
                f"{record['seconds']:.0f}" + f" (share of {together})" * (together > 1),
                trained["device"] + threads * trained["device"].startswith("cpu"),
                record["versions"]["torch"],
                revision[:10] + "+" * bool(changes),
                trained["date"][:10],
            )
        )
    used = sum(map(size, records(root)))  # not the pictures, which git does not keep
    total = f"\n{len(lines) - 2} runs, {used / 1e6:.1f} of at most {LIMIT / 1e6:.0f} MB.\n"
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + total


def epochs(record):
    """ "801", or "7 of 801" for a shortened schedule."""
    whole = f" of {record['published_epochs']}" if shortened(record) else ""
    return f"{record['epochs']}{whole}"


def rows(root=REFERENCE):
    """Published numbers, ours and the difference of every row of the tables with committed runs,
    and of the paper's two-moons panel, as Markdown for README.md."""
    groups = {}
    for record in records(root).values():
        if record["row"]:
            own = [record[key] for key in ("row", "profile", "epochs", "data")]
            groups.setdefault(json.dumps([*own, record.get("size")]), []).append(record)
    frames = []
    for _, runs in sorted(groups.items()):
        row = runs[0]["row"]
        comparison = comparison_table(runs, f"table{row[1]}", [row])
        shown = display_table(comparison).reset_index()
        shown["dataset"] = ["", *[data_source(runs[0])] * (len(shown) - 1)]
        reduced = ", reduced size" * ("size" in runs[0])
        cells = [runs[0]["published_epochs"], *[epochs(runs[0]) + reduced] * (len(shown) - 1)]
        shown.insert(6, "epochs", [str(cell) for cell in cells])
        shown["training time"] = ["", wall_time(runs), *[""] * (len(shown) - 2)]
        frames.append(shown.drop(columns=["K(h∘f)", "tightness %"]))
    parts = ["No run of a row of tables 1 and 2 is committed yet.\n"]
    if frames:
        parts = [markdown(pd.concat(frames).set_index("row"))]
    moons = experiment.experiment_params("slack_sweep", "paper", list(range(1, 33)))
    moons = experiment.finished(moons, root / "paper")
    if moons:
        table = display_moons(moons_table(moons))
        parts += ["Two moons, the slack panel of the paper (training points; in brackets the "
                  f"difference; {epochs(moons[0])} epochs; a run trains {wall_time(moons)}):\n",
                  markdown(table)]  # fmt: skip
    return "\n" + "\n".join(parts) + "\n"


def wall_time(runs):
    """Mean training time of a run and where it was; of runs trained together, each one's share."""
    seconds = np.mean([run["seconds"] for run in runs])
    together = sorted({run["trained_together"] for run in runs})
    devices = sorted({run.get("trained", run)["device"] for run in runs})
    share = f", share of {'-'.join(map(str, together))} at once" * (together != [1])
    return f"{environment.duration(seconds)} on {', '.join(devices)}{share}"


def main():
    parser = environment.parser(__doc__)
    parser.add_argument("results", nargs="?", type=Path, help="a profile's folder, OUT/PROFILE")
    parser.add_argument("names", nargs="*", default=[], help="patterns of run folders")
    parser.add_argument("--weights", type=int, default=1, help="seeds of a row with large weights")
    options = parser.parse_args()
    found = sorted(path.parent for path in options.results.glob("runs/*/result.json")
                   ) if options.results else []  # fmt: skip
    patterns, refused = options.names or ["*"], 0
    for folder in found:
        if any(fnmatch.fnmatch(folder.name, pattern) for pattern in patterns):
            try:
                print("collect:", collect(folder, seeds=options.weights).relative_to(ROOT))
            except (OSError, ValueError) as error:
                refused += 1
                print(f"FAILED collect: {error}", file=sys.stderr)
    for folder in records():
        check(folder)
    environment.write_between(LISTING, BEGIN, END, listing())
    environment.write_between(README, BEGIN, END, rows())
    print(f"collect: {len(records())} runs checked; wrote the tables of README.md and "
          f"{LISTING.relative_to(ROOT)}")  # fmt: skip
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
