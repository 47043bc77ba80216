"""From a parameter file to a result on disk: the schema, the runs, the results store.

A run is one network, one seed: everything it depends on is in one validated record (`Params`),
and everything it leaves is in one folder:

    outputs/<profile>/runs/<name>-seed<k>-<hash>/  result.json  curve.csv  radii.npz
                                                   checkpoint.safetensors

A finished run is read, not redone; a killed run resumes from its last checkpoint. Under torchrun
all ranks make the same calls and get the same records; rank 0 alone reads and writes run folders.
"""

import contextlib
import json
from pathlib import Path

import numpy as np

from ..progress import progress_bar
from .checkpoints import load_checkpoints
from .evaluate import _attacked, _evaluate
from .ranks import connect, count, is_main, on_main
from .schema import PLAIN, Params, load_params
from .store import (
    CERTIFIER,
    _finished,
    _is_incomplete,
    _lock,
    _set_aside,
    _write,
    finished,
    load_dataset,
    load_model,
    only_finished,
    run_dir,
)
from .train import train


def run(params, out_dir, progress=True):
    """Train and certify one run in `out_dir`; returns the result record (dict).

    params: Params, a mapping, or the path of a YAML file. A finished run with the same
    parameters is read; one with other parameters is moved to out_dir/previous-<hash> first. An
    interrupted run resumes from its checkpoint: on a CPU, to the bit-identical result.
    """
    if not isinstance(params, Params):
        params = load_params(params)
    if only_finished():
        record = _finished(params, out_dir, ever=True)
        if record is None:
            raise FileNotFoundError(f"{params.name}, seed {params.seed}, has not run")
        return record
    return _run_together([params], [Path(out_dir)], progress)[0]


def run_all(runs, root, progress=True, stack=None):
    """Train and certify many runs under `root`; returns their result records in order.

    Runs that differ only in name, seed and loss train as one stacked program, at most `stack` at
    a time (default: 32 for the MLP, or for plain networks on CUDA; 1 for others, where a stack
    saves nothing). Under torchrun runs train one by one, on all ranks. Finished runs are read.
    With CLL_ONLY_FINISHED in the environment nothing is computed and only their records return.
    """
    if only_finished():
        return finished(runs, root)
    folders = [run_dir(params, root) for params in runs]
    unique = dict(zip(folders, runs, strict=True))
    if not unique:
        return []
    engine = connect(runs[0].torch_device)
    records = on_main(
        lambda: {folder: _finished(params, folder) for folder, params in unique.items()}, engine
    )
    pending = [
        params
        for folder, params in unique.items()
        if records[folder] is None or _is_incomplete(params, records[folder])
    ]
    batches = list(_batches(pending, root, stack))
    several = progress and len(batches) > 1 and is_main()
    with progress_bar(len(pending), "runs", "run", several) as bar:
        for batch in batches:
            places = [run_dir(params, root) for params in batch]
            records |= zip(places, _run_together(batch, places, progress), strict=True)
            bar.update(len(batch))
    return [records[folder] for folder in folders]


def _batches(runs, root, stack):
    """Groups of runs that can train as one program, resumable ones with their own kind."""
    groups = {}
    own = {"name", "row", "seed", "loss", "radii", "label"}
    own |= {"certify_train", "tightness", "local", "attack"}
    for params in runs:
        alone = params.loss.name == "Local-Lip-B" or count() > 1
        groups.setdefault((params.model_dump_json(exclude=own), alone), []).append(params)
    for (_, alone), group in groups.items():
        model, device = group[0].model, group[0].torch_device
        small = model == "MLP" or (device == "cuda" and model in PLAIN)
        limit = 1 if alone else stack or (32 if small else 1)
        if limit == 1:
            yield from ([params] for params in group)
            continue
        buckets = []  # (common epochs, runs): runs resume together only from a common epoch
        for params in group:
            epochs = frozenset(load_checkpoints(params, run_dir(params, root)))
            for i, (common, members) in enumerate(buckets):
                if (common & epochs or common == epochs) and len(members) < limit:
                    buckets[i] = (common & epochs, [*members, params])
                    break
            else:
                buckets.append((epochs, [params]))
        yield from (members for _, members in buckets)


def _run_together(runs, out_dirs, progress):
    engine = connect(runs[0].torch_device)
    with contextlib.ExitStack() as stack:

        def claim():
            # one order for all processes, so that none waits in a ring
            for out_dir in sorted(out_dirs):
                out_dir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_lock(out_dir))
            # Another process may have finished some of them while this one waited.
            found = [_finished(p, d) for p, d in zip(runs, out_dirs, strict=True)]
            for params, out_dir, record in zip(runs, out_dirs, found, strict=True):
                if record is None:
                    _set_aside(params, out_dir)
            return found

        records = on_main(claim, engine)
        todo = [i for i, r in enumerate(records) if r is None]
        if todo:
            # one process first, which may download them
            with engine.main_process_first() if engine else contextlib.nullcontext():
                datasets = [load_dataset(runs[i]) for i in todo]
            given = [runs[i] for i in todo], datasets, [out_dirs[i] for i in todo]
            nets, seconds = train(*given, device=runs[0].torch_device, progress=progress)

        def complete():
            several = progress and len(todo) > 1
            with progress_bar(len(todo), "certify", "run", several) as bar:
                for k, i in enumerate(todo):
                    more = (out_dirs[i], seconds, len(todo), progress)
                    records[i] = _evaluate(runs[i], nets[k], datasets[k], *more)
                    bar.update()
            return [
                record if i in todo else _completed(runs[i], record, out_dirs[i], progress)
                for i, record in enumerate(records)
            ]

        return on_main(complete, engine)


def _completed(params, record, out_dir, progress):
    """The record of a finished run, certified by this version, with the attack asked for."""
    weights = Path(out_dir) / "checkpoint.safetensors"
    if not _is_incomplete(params, record) or not weights.exists():
        return record
    net, dataset = load_model(out_dir).to(params.torch_device), load_dataset(params)
    if record.get("certifier") != CERTIFIER:
        seconds, together = record["seconds"], record["trained_together"]
        return _evaluate(params, net, dataset, out_dir, seconds, together, progress, record)
    saved = np.load(out_dir / "radii.npz")
    radii = {"guaranteed": saved["radius"]}
    if "radius_local" in saved:
        radii["local"] = saved["radius_local"]
    attack = _attacked(params, net, dataset, radii, saved["correct"], progress)
    if attack is not None:
        record["attack"] = attack
        record["params"]["attack"] = params.attack.model_dump()
        _write(out_dir / "result.json", json.dumps(record, indent=1))
    return record
