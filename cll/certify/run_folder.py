"""The folder of a finished run, read as plain data: a certificate of it needs nothing of
``cll.experiment``, which trained it."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

from ..architectures import build
from ..layers.activations import from_adjacent_pairs

WEIGHTS = "checkpoint.safetensors"
ORDER = {"MaxMin": "halves"}  # metadata of files of weights; those of version 0.2 lack it


def read_record(folder):
    """The result record of a finished run: a dict, its parameters under "params"."""
    path = Path(folder) / "result.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: give the folder of a finished run, outputs/PROFILE/runs/NAME"
        )
    return json.loads(path.read_text())


def load_model(out_dir):
    """The trained network of a finished run's folder, in eval mode on the CPU.

    Raises FileNotFoundError where there is no finished run or no weights, ValueError for damaged
    weights and for parameters that this version does not know.
    """
    record, path = read_record(out_dir), Path(out_dir) / WEIGHTS
    params = record["params"]
    if params.get("variant", "sound") != "sound":  # of SLL layers: earlier versions had others
        raise ValueError(f"variant = {params['variant']!r}: this version knows 'sound' alone")
    options = {"head", "activation", "input_std", "input_mean"} & params.keys()
    options = {key: params[key] for key in options} | params.get("size", {})
    net = build(params["model"], record["num_classes"], record["input_shape"], **options)
    if not path.exists():
        raise FileNotFoundError(
            f"the run has no weights, {path} is missing: committed runs leave large ones out, and "
            "`python -m cll RUN/result.json` trains it again"
        )
    try:
        load_weights(net, path)
    except Exception as error:  # safetensors and torch raise several types for a damaged file
        reason = str(error).splitlines()[0][:100]
        text = f"damaged weights {path} ({reason}); delete the folder to redo the run"
        raise ValueError(text) from None
    return net.eval()


def in_order(path):
    """Whether the weights in a file are for MaxMin on halves of the channels."""
    with safe_open(path, "pt") as file:
        return ORDER.items() <= (file.metadata() or {}).items()


def load_weights(net, path, strict=True):
    """Load a file of a run, also one of version 0.2, into its network."""
    net.load_state_dict(load_file(path), strict=strict)
    if not in_order(path):
        from_adjacent_pairs(net)
