"""What training on a GPU is worth: `bash benchmarks/gpu.sh` runs this, in at most nine minutes.

    python benchmarks/gpu.py [--into FOLDER] [--device cuda] [--data npz:cifar10.npz]
        [--profile smoke] [--seconds 540]

Every stage runs in a process of its own under a time limit, so that one that fails or hangs costs
its own result alone; the status is then 1. `gpu.md` and `gpu.json` in the folder hold what was
measured, STAGE.log what a stage printed, all of it up to the stage at work. Images are CIFAR-10
where --data or $CLL_DATA holds it, else scikit-learn's digits, repeated to as many: steps take as
long, accuracies say little.
Profile smoke runs all of it at tiny sizes, also on a CPU: a check of the mechanics.
"""

import argparse
import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import cll
from cll import training

sys.path.insert(0, str(Path(__file__).parent))
import baseline  # noqa: E402
import clock  # noqa: E402
import systems  # noqa: E402

FILES = ("table2/cifar10-4C3F-CLL", "table2/cifar10-6C2F-CLL")
SMOKE = {"epochs": 2, "batch_size": 16, "size": {"width": 0.125}}
PRECISION = "tf32"  # of the long runs: fastest of those whose K and weights are float32
END = 10  # seconds kept for the summary
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
        x, y = data.train_images[rows], data.train_targets[rows]
        data = dataclasses.replace(
            data, name="digits, repeated to 50,000", train_images=x, train_targets=y
        )
    n = 64 if args.smoke else None
    halves = ("train_images", "train_targets", "test_images", "test_targets")
    return dataclasses.replace(data, **{name: getattr(data, name)[:n] for name in halves})


# ---- the stages, each in its own process: functions of the arguments, to a dict ------------------


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
    began = time.perf_counter()
    _, iterations = network.converge()
    converge_s = time.perf_counter() - began
    per_epoch = len(data.train_targets) // params.batch_size
    whole = params.epochs * (per_epoch * step_s + converge_s) / 60
    return {
        "ms per step with loading": 1e3 * step_s,
        "s of convergence after an epoch": converge_s,
        "iterations": iterations,
        EXTRAPOLATED: whole,
    }


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
        folder.mkdir(parents=True)
    return training.train(params, [data] * len(params), folders, args.device, progress=False)[0]


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
    """Write what a stage knows so far where `attempt` reads it; never half of it."""
    temporary = args.into / f"{name}.json.tmp"
    temporary.write_text(json.dumps(results, indent=1))
    os.replace(temporary, args.into / f"{name}.json")


# name -> (function, seconds that it may take); nine takes what is left
STAGES = {"steps": (steps, 60), "baseline": (textbook, 60), "memory": (memory, 40)}
STAGES |= {"single": (single, 240), "nine": (nine, 540)}


def attempt(args, name, limit):
    """Run a stage in a process of its own; {"ok", "seconds", and its results or why it failed}."""
    kept, log = args.into / f"{name}.json", args.into / f"{name}.log"
    kept.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--stage", name, "--into", str(args.into)]
    command += ["--device", args.device, "--profile", "smoke" if args.smoke else "full"]
    command += ["--data", args.data] if args.data else []
    began = time.monotonic()
    with open(log, "w") as file:
        # a group and no session: whoever ends the session of this process ends the stage with it
        process = subprocess.Popen(command, stdout=file, stderr=file, process_group=0)
        try:
            code = process.wait(max(1, limit))
        except subprocess.TimeoutExpired:
            code = "time"
        finally:  # with the workers of a DataLoader
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    result = {"ok": code == 0, "seconds": time.monotonic() - began}
    if name in ("single", "nine"):
        result |= progress(args, name)
        result["ok"] |= code == "time" and "epochs" in result  # to be extrapolated
    if kept.exists():
        result |= json.loads(kept.read_text())
    if code == "time":
        result["stopped"] = f"stopped after {limit:.0f} s"
    elif code:
        text = log.read_text().strip().splitlines() or [f"status {code}"]
        result["error"] = text[-1][:300]
    return result


def markdown(record):
    """The summary as text: a line for each stage, then the steps."""
    lines = []
    for name, result in record["stages"].items():
        numbers = {k: v for k, v in result.items() if not isinstance(v, bool | str | list)}
        notes = [f"{key}: {value:.4g}" for key, value in numbers.items()]
        notes += [result[k] for k in ("stopped", "error") if k in result]
        state = "ok" if result["ok"] else "FAILED"
        lines.append({"stage": name, "state": state, "measured": "; ".join(notes)})
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    text = f"# 4C3F with CLL on {record['device']}\n\n{versions}; {record['data']}\n\n"
    if record["profile"] == "smoke":
        text += "Profile smoke: a check of the mechanics; the numbers mean nothing.\n\n"
    text += clock.markdown(lines)
    if rows := record["stages"].get("steps", {}).get("rows"):
        text += f"\nSteps; share: of a large matrix product.\n\n{clock.markdown(rows)}"
    return text


def against_textbook(stages):
    """Add to the trainings how many times as long the textbook way takes for as many seeds."""
    theirs = stages.get("baseline", {}).get(EXTRAPOLATED)
    for name in ("single", "nine"):
        result = stages.get(name, {})
        if theirs and "epochs" in result:
            ours = result.get(EXTRAPOLATED, result["min"])
            result["textbook way, extrapolated, over ours"] = result["seeds"] * theirs / ours


def main():
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--into", type=Path, default=cll.ROOT / "outputs/gpu")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--data", default="", help="CIFAR-10 as npz:PATH or folder:PATH")
    parser.add_argument("--profile", default="full", choices=["full", "smoke"])
    parser.add_argument("--seconds", type=float, default=540, help="for everything")
    parser.add_argument("--only", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.smoke, args.into = args.profile == "smoke", args.into.absolute()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "gpu.py: PyTorch finds no CUDA device; --device cpu --profile smoke checks the script"
        )
    if args.stage:
        keep(args, args.stage, STAGES[args.stage][0](args))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # `attempt` ends its stage
    args.into.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(args.into / "runs", ignore_errors=True)  # else training would resume
    source, _ = clock.origin(args.device)
    record = {"profile": args.profile, **source, "data": images(args).name, "stages": {}}
    for name in args.only:
        left = args.seconds - END - (time.monotonic() - began)
        result = record["stages"][name] = attempt(args, name, min(STAGES[name][1], left))
        against_textbook(record["stages"])
        print(f"{name}: {'ok' if result['ok'] else 'FAILED'}", flush=True)
        (args.into / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.into / "gpu.md").write_text(markdown(record))
    print("\n" + markdown(record))
    failed = [name for name, result in record["stages"].items() if not result["ok"]]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see {args.into}")


if __name__ == "__main__":
    main()
