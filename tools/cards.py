"""Write the model card of each committed image network from its record: README.md in the folder of
its run. `make collect` does it too.

    python tools/cards.py
"""

import hashlib
import sys
from pathlib import Path

import environment  # tools/ is on the path: this file is run as a script
import pandas as pd

ROOT = Path(environment.ROOT)
sys.path.insert(0, str(ROOT))

from cll.experiment import reference  # noqa: E402
from paper import records  # noqa: E402

CARD = """# {key}

<!-- written from result.json by python tools/cards.py -->

{model} with {parameters:,} parameters for {data}, trained with {method} at ε = {epsilon}: an
image classifier whose answers come with certified radii. Epochs: {epochs}; seed {seed}.

```python
import cll, torch

net = torch.hub.load("path/to/checkout", "{key}", source="local")
net = cll.load_reference("{name}")  # the same network
cll.certify(net, (images, labels))  # a radius for each image
```

## Accuracy

Percent of {test_size:,} test images: right (clean), and right with a certified radius above the one
that a column names (CRA).

{accuracy}

Local bounds, where a row has them, are proofs as well. The paper-style row takes the value that
power iteration converges to, from below: no proof. K(f) = {K} bounds how fast one logit minus
another changes with the image; the search for the fastest pair of images reached {tightness} %
of it. {note}

## What the certificate means

For an image with certified radius r, no other image at an L2 distance below r gets another answer,
whatever made it: an attack, noise, a camera. Distances are those of the un-normalised image with
values in [0, 1]; 36/255 is the length of a change of one value by 36 grey levels. This is proven
for the function that these weights define. Every Lipschitz constant in the proof is an upper bound,
and what float64 rounds off the logits of the image is subtracted. `python -m cll.certify write` and
`verify`, on the folder of this run, prove it again.

## What it does not mean

- Not that the answer is right: a wrong answer has a radius too. CRA counts right ones alone.
- Nothing about changes longer than r. Shifts, turns, crops and changes of brightness mostly are.
- Nothing about other norms beyond what follows from L2.
- Nothing about an image before its radius is computed. The table is about these test images;
  others, of another camera or another task, may have smaller radii, or none.
- Nothing about float32, bfloat16, ONNX or another program, which round otherwise: at the edge of a
  radius they may answer otherwise.
- No statement about fairness, privacy or fitness for a purpose. The network is made for research on
  certified training.

## Data

{source}

## Recipe

{recipe}

`{command}` trains it anew.

## Hashes

{hashes}

What the columns mean, and a word in brackets behind the name of the data, stands in
[the list of all committed runs](../../../README.md).
"""
BOUNDS = dict(zip(records.BOUNDS, ("cra", "cra_paper_style", "cra_local"), strict=True))
RECIPE = ("loss", "optimizer", "epochs", "batch_size", "augmentation", "power_iterations")


def table(rows, columns=("", "value")):
    return records.markdown(pd.DataFrame(rows, columns=list(columns))).strip()


def accuracy(record):
    """Clean accuracy and CRA by each bound, under attack where it was attacked, and as printed."""
    radii, shown = record["params"]["radii"], {}
    for bound, key in BOUNDS.items():
        if cra := record.get(key):
            shown[bound] = [100 * value for value in (record["clean"], *map(cra.get, radii))]
    if attack := record.get("attack"):
        for what, key in (("guaranteed", "cra"), (f"right under {attack['method']}", "accuracy")):
            values = attack["clean"], *map(attack[key].get, radii)
            shown[f"the first {attack['images']}, {what}"] = [100 * value for value in values]
    if row := record["row"]:
        printed = records.published(f"table{row[1]}")
        printed = printed.loc[row, ["clean", *records.RADII]]
        shown |= {f"printed in the paper (row {row})": printed} if printed.notna().any() else {}
    rows = [(key, *map(records.cell_text, values)) for key, values in shown.items()]
    return table(rows, ["", "clean %", *(f"CRA({radius}) %" for radius in radii)])


def settings(values, inside=""):
    """(key, value) of nested parameters; without those that are not set."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from settings(value, f"{inside}{key}.")
        elif value is not None and value != []:
            yield f"{inside}{key}", value


def source(record):
    """What the network was trained and tested on, and how it sees an image."""
    params = record["params"]
    yield "data", records.data_source(record)
    yield "read from", record.get("source", params["data"])
    yield "training images", f"{record['train_size']:,}"
    yield "test images", f"{record['test_size']:,}"
    yield "classes", record["num_classes"]
    yield "one image", f"{record['input_shape']}, values in [0, 1]"
    yield "normalised by", f"mean {params['input_mean']}, std {params['input_std']}"


def hashes(folder, record):
    """What the numbers above are about, exactly."""
    for name in (reference.WEIGHTS, "radii.npz"):
        yield f"{name} (SHA-256)", hashlib.sha256((folder / name).read_bytes()).hexdigest()
    trained = record.get("trained", record)
    yield "parameters", record["params_hash"]
    yield "revision", trained["git_revision"]
    yield "trained", f"{trained['date'][:10]}, {trained['device']}"
    yield "PyTorch", record["versions"]["torch"]


def card(key, name, folder):
    """The model card of a committed network as Markdown."""
    record = reference.read_record(folder)
    params, note = record["params"], records.tightness_note([record])
    precision = record.get("trained", {}).get("precision") or params["precision"]
    recipe = {part: params[part] for part in RECIPE} | {"precision": precision}
    return CARD.format(
        **{k: record[k] for k in ("model", "parameters", "seed", "test_size")},
        method=records.method(record),
        key=key,
        name=name,
        data=records.data_source(record),
        epsilon=records.or_dash("g", record["epsilon"]),
        epochs=records.epochs(record),
        accuracy=accuracy(record),
        K=records.or_dash(".4g", record["K_f"]),
        tightness=records.cell_text(records.in_paper_unit(record, "tightness", "guaranteed")),
        note=note and f"({note.capitalize()}.)",
        source=table(source(record)),
        recipe=table(settings(recipe)),
        command=reference.command(folder, record),
        hashes=table(hashes(folder, record)),
    )


def cards(root=reference.REFERENCE):
    """{file: text} of all cards."""
    folders = reference.names(root)
    networks = reference.images(root).items()
    return {folders[name] / "README.md": card(key, name, folders[name]) for key, name in networks}


def write():
    """Write all cards; returns how many."""
    for path, text in (written := cards()).items():
        environment.write(path, text)
    return len(written)


if __name__ == "__main__":
    print(f"cards: wrote {write()} under {reference.REFERENCE.relative_to(ROOT)}")
