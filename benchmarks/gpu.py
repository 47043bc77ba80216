"""What training on a GPU is worth: the stages of `bash benchmarks/gpu.sh`, and their summary.

    python benchmarks/gpu.py STAGE [--into FOLDER] [--device cuda] [--data npz:cifar10.npz]
        [--profile smoke]

gpu.sh gives every stage a process and a time limit, so that one that fails or hangs costs its own
result alone. STAGE.json in the folder holds what a stage measured so far, STAGE.log what it
printed, STAGE.status how it ended; the stage `summary` makes gpu.md and gpu.json of them. Images
are CIFAR-10 where --data or $CLL_DATA holds it, else scikit-learn's digits, repeated to as many:
steps take as long, accuracies say little.
Profile smoke runs all of it at tiny sizes, also on a CPU: a check of the mechanics.
"""

import csv
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import baseline
import clock
import systems
import torch

import cll
from cll import experiment

FILES = ("table2/cifar10-4C3F-CLL", "table2/cifar10-6C2F-CLL")
SMOKE = {"epochs": 2, "batch_size": 16, "size": {"width": 0.125}}
PRECISION = "tf32"  # of the long runs: fastest of those whose K and weights are float32
EXTRAPOLATED = "min for all epochs, extrapolated"


def runs(args, seeds):
    """Parameters of 4C3F with CLL as in table 2, without what follows the certificate."""
    over = {"precision": PRECISION, "device": args.device} | (SMOKE if args.smoke else {})
    file = cll.ROOT / f"params/{FILES[0]}.yaml"
    return [cll.load_params(file, "paper", seed=seed, **over) for seed in range(1, seeds + 1)]


def images(args):
    """The training and test images of all stages."""
    try:
        data = cll.data.load(args.data or "cifar10", download=False)
    except FileNotFoundError:
        if args.data:
            raise
        data = cll.data.load("digits")
        rows = torch.arange(50_000) % len(data.train_targets)
        train = {"train_images": data.train_images[rows], "train_targets": data.train_targets[rows]}
        data = dataclasses.replace(data, name="digits, repeated to 50,000", **train)
    n = 64 if args.smoke else None
    halves = ("train_images", "train_targets", "test_images", "test_targets")
    return dataclasses.replace(data, **{name: getattr(data, name)[:n] for name in halves})


# ---- the stages, each in its own process: functions of the arguments, to a dict -----------------


def steps(args):
    """Milliseconds of a step, and what the products of the network alone reach of the measured rate
    of a matrix product: in float32, or for tf32 and bfloat16 in TF32."""
    files, batch, rounds = (FILES[:1], 8, 1) if args.smoke else (FILES, 128, 30)
    size = (256, 1, 1) if args.smoke else (8192, 1024, 5)
    rates = [clock.rates(*size, device=args.device, tf32=tf32)[0] for tf32 in (False, True)]
    variants, rows = systems.VARIANTS if args.device == "cuda" else ("eager",), []
    for file in files:
        system = systems.measure(file, batch, args.device, rounds, variants=variants)
        flops, _ = clock.cost(cll.build(system["network"]), batch)
        for name, seconds in system["seconds"].items():
            rate = flops / seconds
            row = {"network": system["network"], "step": name, "ms": 1e3 * seconds}
            row |= {"TFLOP/s": rate / 1e12, "share": rate / rates[name in ("tf32", "bfloat16")]}
            rows.append(row)
        results = {"batch": batch, "float32 TFLOP/s": rates[0] / 1e12, "rows": rows}
        results["TF32 TFLOP/s"] = rates[1] / 1e12
        keep(args, "steps", results)  # the next network may take too long
    return results


def textbook(args):
    """The baseline: a step with loading, the convergence after an epoch, and what 801 epochs of
    both come to."""
    (params,), data = runs(args, 1), images(args)
    network = baseline.Baseline(params, data, args.device)
    batches, (warm, count) = network.endless(), (1, 2) if args.smoke else (20, 200)

    def several(count):
        for _ in range(count):
            network.step(*next(batches))

    several(warm)
    step_s = clock.seconds(lambda: several(count)) / count  # the mean: loading comes in bursts
    iterations = []
    converge_s = clock.seconds(lambda: iterations.append(network.converge()[1]))
    per_epoch = len(data.train_targets) // params.batch_size
    whole = params.epochs * (per_epoch * step_s + converge_s) / 60
    measured = {"ms per step with loading": 1e3 * step_s, "iterations": iterations[0]}
    measured |= {"s of convergence after an epoch": converge_s}
    return measured | {EXTRAPOLATED: whole}


def memory(args):
    """Peak memory of nine stacked runs in training, data and augmentation included."""
    several = [run.model_copy(update={"epochs": 1}) for run in runs(args, 2 if args.smoke else 9)]
    trained(args, "memory", several, images(args))
    return {"seeds": len(several), "MiB at most": clock.peak(args.device)}


def single(args):
    """One seed, all epochs, then certified."""
    (params,), data = runs(args, 1), images(args)
    (net,) = trained(args, "single", [params], data)
    summary = cll.certify(net.to(args.device), data, progress=False).attrs["summary"]
    cra = {f"CRA at {255 * radius:.0f}/255": value for radius, value in summary["cra"].items()}
    return {"clean": summary["clean"], **cra, "K_f": summary["K_f"]}


def nine(args):
    """Nine seeds together, as far as the time goes."""
    trained(args, "nine", runs(args, 2 if args.smoke else 9), images(args))
    return {}


def trained(args, name, params, data):
    """The networks of some runs, trained together on the same data."""
    folders = [args.into / "runs" / name / f"seed{run.seed}" for run in params]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)  # else training would resume
        folder.mkdir(parents=True)
    return experiment.train.train(
        params, [data] * len(params), folders, args.device, progress=False
    )[0]


def progress(args, name):
    """How far a training came, from its curves: also where it was stopped."""
    curves = sorted((args.into / "runs" / name).glob("seed*/curve.csv"))
    rows = list(csv.DictReader(curves[0].read_text().splitlines())) if curves else []
    if not rows:
        return {}
    done, minutes = len(rows), float(rows[-1]["seconds"]) * len(curves) / 60
    epochs = runs(args, 1)[0].epochs
    reached = {"seeds": len(curves), "epochs": done, "of": epochs, "min": minutes}
    return reached | ({EXTRAPOLATED: minutes * epochs / done} if done < epochs else {})


def keep(args, name, results):
    """Write what a stage knows so far where `summary` reads it; never half of it."""
    temporary = args.into / f"{name}.json.tmp"
    temporary.write_text(json.dumps(results, indent=1))
    os.replace(temporary, args.into / f"{name}.json")


STAGES = {"steps": steps, "baseline": textbook, "memory": memory, "single": single, "nine": nine}


def outcome(args, name):
    """How a stage ended and what it measured: {"ok", "note", numbers}. A training that its time
    limit stopped is ok, to be extrapolated."""
    file, status = args.into / f"{name}.json", args.into / f"{name}.status"
    code = int(status.read_text()) if status.exists() else None
    numbers = progress(args, name) | (json.loads(file.read_text()) if file.exists() else {})
    log = (args.into / f"{name}.log").read_text().strip().splitlines() if code else []
    stopped = code in (124, 137)  # of `timeout`
    note = "stopped at its time limit" if stopped else (log or [""])[-1][:300]
    return {"ok": code == 0 or (stopped and "epochs" in numbers), "note": note, **numbers}


def summary(args):
    """All stages that ran, as a record and as Markdown; the second the status of the command."""
    source, machine = clock.origin(args.device)
    stages = {n: outcome(args, n) for n in STAGES if (args.into / f"{n}.status").exists()}
    theirs = stages.get("baseline", {}).get(EXTRAPOLATED)
    for result in stages.values():
        if theirs and "of" in result:
            ours = result.get(EXTRAPOLATED, result["min"])
            result["textbook way, extrapolated, over ours"] = result["seeds"] * theirs / ours
    lines = []
    for name, result in stages.items():
        numbers = {k: v for k, v in result.items() if not isinstance(v, bool | str | list)}
        notes = [f"{key}: {value:.4g}" for key, value in numbers.items()]
        state = "ok" if result["ok"] else "FAILED"
        notes = "; ".join(filter(None, [result["note"], *notes]))
        lines.append({"stage": name, "state": state, "measured": notes})
    text = f"# 4C3F with CLL\n\n{machine}; {images(args).name}\n\n"
    if args.smoke:
        text += "Profile smoke: a check of the mechanics; the numbers mean nothing.\n\n"
    text += clock.markdown(lines)
    if rows := stages.get("steps", {}).get("rows"):
        text += f"\nSteps; share: of a large matrix product.\n\n{clock.markdown(rows)}"
    (args.into / "gpu.md").write_text(text)
    record = {"smoke": args.smoke, **source, "stages": stages}
    (args.into / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    print(text)
    return not all(result["ok"] for result in stages.values())


def main():
    parser = clock.parser(__doc__)
    parser.add_argument("stage", choices=[*STAGES, "summary"])
    parser.add_argument("--into", type=Path, default=cll.ROOT / "outputs/gpu")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--data", default="", help="CIFAR-10 as npz:PATH or folder:PATH")
    parser.add_argument("--profile", default="full", choices=["full", "smoke"])
    args = parser.parse_args()
    args.smoke, args.into = args.profile == "smoke", args.into.absolute()
    if args.device == "cuda" and not torch.cuda.is_available():
        instead = "--device cpu --profile smoke checks the script"
        sys.exit(f"gpu.py: PyTorch finds no CUDA device; {instead}")
    args.into.mkdir(parents=True, exist_ok=True)
    if args.stage == "summary":
        sys.exit(summary(args))
    keep(args, args.stage, STAGES[args.stage](args))


if __name__ == "__main__":
    main()
