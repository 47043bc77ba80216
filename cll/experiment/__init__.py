"""From a parameter file to result.json: one run, many runs, what is finished."""

from ..kit import kit

kit("yaml")  # of parameter files

from .runs import recertify, run, run_all
from .schema import (
    PLAIN,
    PROFILES,
    ROOT,
    Params,
    experiment_params,
    load_params,
    load_runs,
    sized_as,
)
from .store import finished, load_dataset, load_model, outputs_dir, provenance, run_dir
