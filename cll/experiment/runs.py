"""Runs: train what has not finished, certify it, read the rest.

A run is one network, one seed: all that it depends on is in one record (`Params`), and all that it
leaves in one folder:

    outputs/<profile>/runs/<name>-seed<k>-<hash>/  result.json  curve.csv  radii.npz
                                                   checkpoint.safetensors

A killed run resumes from its last checkpoint. Under torchrun all ranks make the same calls and get
the same records; rank 0 alone reads and writes run folders.
"""

import contextlib
from pathlib import Path

import numpy as np
from filelock import FileLock

from ..progress import progress_bar
from . import store
from .checkpoints import load_checkpoints
from .evaluate import Trained, attacked, evaluate
from .ranks import connect, count, is_main, on_main
from .schema import PLAIN, Params, load_params
from .train import train


def run(params, out_dir, progress=True):
    """Train and certify one run in `out_dir`; returns the result record (dict).

    params: Params, a mapping, or the path of a YAML file. A finished run with the same
    parameters is read; one with other parameters is moved to out_dir/previous-<hash> first. An
    interrupted run resumes from its checkpoint: on a CPU, to the bit-identical result.
    Raises ValueError for a run that an earlier version certified, see `recertify`.
    """
    if not isinstance(params, Params):
        params = load_params(params)
    if not store.only_finished():
        return _run_together([params], [Path(out_dir)], progress)[0]
    record = store.read_record(params, out_dir)
    if record is None:
        raise FileNotFoundError(f"{params.name}, seed {params.seed}, has not run")
    return record


def run_all(runs, root, progress=True, stack=None):
    """Train and certify many runs under `root`; returns their result records in order.

    Runs that differ only in name, seed and loss train as one stacked program, at most `stack` at
    a time (default: 32 for the MLP, or for plain networks on CUDA; 1 for others, where a stack
    saves nothing). Under torchrun runs train one by one, on all ranks. Finished runs are read.
    With CLL_ONLY_FINISHED in the environment nothing is computed and only their records return.
    Raises ValueError for runs that an earlier version certified, see `recertify`.
    """
    if store.only_finished():
        return store.finished(runs, root)
    unique = {store.run_dir(params, root): params for params in runs}
    if not unique:
        return []
    engine = connect(runs[0].torch_device)
    records = on_main(lambda: _read(unique.values(), unique), engine)
    records = dict(zip(unique, records, strict=True))
    pending = [unique[f] for f, record in records.items() if store.lacks(unique[f], record)]
    batches = list(_batches(pending, root, stack))
    several = progress and len(batches) > 1 and is_main()
    with progress_bar(len(pending), "runs", "run", several) as bar:
        for batch in batches:
            folders = [store.run_dir(params, root) for params in batch]
            records |= zip(folders, _run_together(batch, folders, progress), strict=True)
            bar.update(len(batch))
    return [records[store.run_dir(params, root)] for params in runs]


def _read(runs, folders):
    """The record of each run, None where it has not finished."""
    since = store.fresh_since()
    return [store.read_record(*run, since) for run in zip(runs, folders, strict=True)]


def _batches(runs, root, stack):
    """Groups of runs that can train as one program. Those with checkpoints resume among
    themselves: a new run would take them back to their start."""
    groups = {}
    free = {"name", "row", "seed", "loss", "radii", "label"}  # may differ
    free |= {"certify_train", "tightness", "local", "attack"}
    for params in runs:
        plain_on_cuda = params.torch_device == "cuda" and params.model in PLAIN
        limit = stack or (32 if params.model == "MLP" or plain_on_cuda else 1)
        if params.loss.local_K is not None or count() > 1:
            limit = 1
        begun = limit > 1 and bool(load_checkpoints(params, store.run_dir(params, root)))
        key = params.model_dump_json(exclude=free), limit, begun
        groups.setdefault(key, []).append(params)
    for (_, limit, _), group in groups.items():
        yield from (group[i : i + limit] for i in range(0, len(group), limit))


def _run_together(runs, out_dirs, progress):
    """Claim the folders; train what has not finished as one program; certify it; complete what has
    finished. Returns the records."""
    engine = connect(runs[0].torch_device)
    with contextlib.ExitStack() as claimed:

        def claim():
            # one order for all processes, so that none waits in a ring
            for out_dir in sorted(out_dirs):
                out_dir.mkdir(parents=True, exist_ok=True)
                claimed.enter_context(FileLock(out_dir / ".lock"))
            # another process may have finished some of them while this one waited
            records = _read(runs, out_dirs)
            for out_dir, record in zip(out_dirs, records, strict=True):
                if record is None:
                    store.set_aside(out_dir)
            return records

        records = on_main(claim, engine)
        todo = [i for i, record in enumerate(records) if record is None]
        # one process first, which may download them
        with engine.main_process_first() if engine else contextlib.nullcontext():
            datasets = [store.load_dataset(runs[i]) for i in todo]
        nets, seconds, way = [], None, {}
        if todo:
            given = [runs[i] for i in todo], datasets, [out_dirs[i] for i in todo]
            nets, seconds, way = train(*given, runs[0].torch_device, progress)

        def complete():
            several = progress and len(todo) > 1
            with progress_bar(len(todo), "certify", "run", several) as bar:
                for i, net, dataset in zip(todo, nets, datasets, strict=True):
                    new = Trained(runs[i], net, dataset, out_dirs[i], seconds, len(todo), way)
                    records[i] = evaluate(new, progress)
                    bar.update()
            for i in set(range(len(runs))) - set(todo):
                records[i] = _completed(runs[i], records[i], out_dirs[i], progress)
            return records

        return on_main(complete, engine)


def _completed(params, record, out_dir, progress):
    """The record of a finished run with the attack that its parameters ask for."""
    missing = store.lacks(params, record)
    if missing == "certificate":
        anew = "certify its weights anew with python -m cll FILE --recertify"
        raise ValueError(
            f"{params.name}, seed {params.seed}, was certified by an earlier version of this kit, "
            f"in {out_dir}: {anew}, or experiment.recertify"
        )
    if missing is None or not (out_dir / "checkpoint.safetensors").exists():
        return record
    net = store.load_model(out_dir).to(params.torch_device)
    saved = np.load(out_dir / "radii.npz")
    radii = {"guaranteed": saved["radius"]}
    if "radius_local" in saved:
        radii["local"] = saved["radius_local"]
    attack = attacked(params, net, store.load_dataset(params), radii, saved["correct"], progress)
    if attack is not None:
        record["attack"] = attack
        record["params"]["attack"] = params.attack.model_dump()
        store.write_record(record, out_dir)
    return record


def recertify(params, out_dir, progress=True):
    """Certify a finished run of an earlier version anew, from its weights. Returns its record;
    place and time of training, the lower bound of K and the snapshots stay. A run that this
    version certified is read. FileNotFoundError: there is no finished run, or it has no weights."""
    out_dir = Path(out_dir)
    record = store.read_record(params, out_dir)
    if record is None:
        raise FileNotFoundError(f"no finished run of {params.name} in {out_dir}")
    if store.lacks(params, record) != "certificate":
        return record
    net, together = store.load_model(out_dir), record["trained_together"]
    with FileLock(out_dir / ".lock"):
        dataset = store.load_dataset(params)
        old = Trained(params, net, dataset, out_dir, None, together, {}, record)
        return evaluate(old, progress)
