"""What training on a GPU is worth: `bash benchmarks/gpu.sh` runs this, in at most nine minutes.

    python benchmarks/gpu.py [--into FOLDER] [--device cuda] [--data npz:cifar10.npz]
        [--profile smoke] [--seconds 540]

Every part runs in a process of its own under a time limit, so that one that fails or hangs costs
its own result alone; the status is then 1. `gpu.md` and `gpu.json` in the folder hold what was
measured, PART.log what a part printed, all of it up to the part at work. Images are CIFAR-10 where
--data or $CLL_DATA holds it, else scikit-learn's digits, repeated to as many: steps take as long,
accuracies say little.
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
from cll.bounds.linear import full_precision
from cll.experiment import provenance
from cll.experiment.train import train

sys.path.insert(0, str(Path(__file__).parent))
import baseline  # noqa: E402
import step  # noqa: E402

SMOKE = {"epochs": 2, "batch_size": 16, "size": {"width": 0.125}}
PRECISION = "tf32"  # of the long runs: fastest of those whose K and weights are float32
END = 10  # seconds kept for the summary


def runs(args, seeds):
    """Parameters of 4C3F with CLL as in table 2, without what follows the certificate."""
    over = {"precision": PRECISION, "device": args.device} | (SMOKE if args.smoke else {})
    file = cll.ROOT / f"params/{baseline.RUNS['4C3F']}.yaml"
    return [cll.load_params(file, "paper", seed=seed, **over) for seed in range(1, seeds + 1)]


def images(args):
    """The training and test images of all parts."""
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


# ---- the parts, each in its own process: functions of the arguments, to a dict ------------------


def tests(args):
    """The tests that need a CUDA device."""
    files = [str(cll.ROOT / f"tests/test_{name}.py") for name in ("cuda", "data")]
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", *files]
    # into the log of this part as it goes: where time runs out, it says which tests passed
    done = subprocess.run(command, cwd=cll.ROOT)
    result = (args.into / "tests.log").read_text().strip().splitlines()[-1].strip("= ")
    if done.returncode or (args.device == "cuda" and "skipped" in result):
        sys.exit(f"tests: {result}")
    return {"result": result}


def steps(args):
    """Milliseconds of a step, and what the products of the network alone reach of the measured rate
    of a matrix product: in float32, or for tf32 and bfloat16 in TF32."""
    models, batch, repeats = (["4C3F"], 8, 1) if args.smoke else (["4C3F", "6C2F"], 128, 30)
    rows, rates = [], [matmul(args), matmul(args, tf32=True)]
    for model in models:
        flops, _ = baseline.step_cost(cll.build(model), batch)
        for name, seconds in step.measure(model, batch, args.device, repeats).items():
            row = {"model": model, "variant": name, "ms": 1e3 * seconds, "flops": flops / seconds}
            rate = rates[name.endswith(("tf32", "bfloat16"))]
            rows.append(row | {"utilisation": row["flops"] / rate})
        found = {"batch": batch, "rows": rows, "matmul": rates[0], "matmul_tf32": rates[1]}
        keep(args, "steps", found)  # the next network may take too long
    return found


def matmul(args, tf32=False):
    """FLOP/s of a large matrix product."""
    size = (256, 1, 1) if args.smoke else (8192, 1024, 5)
    with full_precision(torch.device(args.device), tf32):
        baseline.rates.cache_clear()
        return baseline.rates(*size, device=args.device)[0]


def textbook(args):
    """The baseline: a step with loading, the convergence after an epoch, and what 801 epochs of
    both come to."""
    (params,), data = runs(args, 1), images(args)
    own = baseline.Baseline(params, data, args.device)
    warm, count = (1, 2) if args.smoke else (20, 200)
    batches, marks = own.endless(), []
    for _ in range(warm + count + 1):
        own.step(*next(batches))  # ends with .item()
        marks.append(time.perf_counter())
    began = time.perf_counter()
    _, iterations = own.converge()
    converge = time.perf_counter() - began
    seconds = (marks[-1] - marks[warm]) / count
    per_epoch = len(data.train_targets) // params.batch_size
    whole = params.epochs * (per_epoch * seconds + converge)
    own = {"step_ms": 1e3 * seconds, "converge_s": converge, "iterations": iterations}
    return own | {"extrapolated_s": whole, "epochs": params.epochs, "data": data.name}


def memory(args):
    """Peak memory of nine stacked runs in training, data and augmentation included."""
    several = [run.model_copy(update={"epochs": 1}) for run in runs(args, 2 if args.smoke else 9)]
    trained(args, "memory", several, images(args))
    found = {"seeds": len(several), "MiB": baseline.highest()}
    if args.device == "cuda":
        found["MiB"] = torch.cuda.max_memory_allocated() / 2**20
        found["reserved_MiB"] = torch.cuda.max_memory_reserved() / 2**20
    return found


def single(args):
    """One seed, all epochs, then certified."""
    (params,), data = runs(args, 1), images(args)
    (net,) = trained(args, "single", [params], data)
    summary = cll.certify(net.to(args.device), data, progress=False).attrs["summary"]
    cra = {f"{255 * radius:.0f}/255": value for radius, value in summary["cra"].items()}
    return {"clean": summary["clean"], "cra": cra, "K_f": summary["K_f"]}


def nine(args):
    """Nine seeds together, as far as the time goes."""
    trained(args, "nine", runs(args, 2 if args.smoke else 9), images(args))
    return {}


def trained(args, name, params, data):
    folders = [args.into / "runs" / name / f"seed{run.seed}" for run in params]
    for folder in folders:
        folder.mkdir(parents=True)
    return train(params, [data] * len(params), folders, args.device, progress=False)[0]


def progress(args, name):
    """How far a training came, from its curves: also where it was stopped."""
    curves = sorted((args.into / "runs" / name).glob("seed*/curve.csv"))
    rows = list(csv.DictReader(curves[0].read_text().splitlines())) if curves else []
    if not rows:
        return {}
    done, seconds = len(rows), float(rows[-1]["seconds"]) * len(curves)
    epochs = runs(args, 1)[0].epochs
    found = {"seeds": len(curves), "epochs": done, "of": epochs, "trained_s": seconds}
    return found | {"total_s": seconds * epochs / done}  # extrapolated, where epochs are missing


def keep(args, name, found):
    """What a part has found so far, where `attempt` reads it; never half of it."""
    temporary = args.into / f"{name}.json.tmp"
    temporary.write_text(json.dumps(found, indent=1))
    os.replace(temporary, args.into / f"{name}.json")


# name -> (function, seconds that it may take); nine takes what is left
PARTS = {"tests": (tests, 140), "steps": (steps, 60), "baseline": (textbook, 60)}
PARTS |= {"memory": (memory, 40), "single": (single, 240), "nine": (nine, 540)}


def attempt(args, name, limit):
    """Run a part in a process of its own; {"ok", "seconds", and what it found or why it failed}."""
    own, log = args.into / f"{name}.json", args.into / f"{name}.log"
    own.unlink(missing_ok=True)
    options = ["--device", args.device, "--profile", "smoke" if args.smoke else "full"]
    options += ["--data", args.data] if args.data else []
    command = [sys.executable, __file__, "--part", name, "--into", str(args.into), *options]
    began = time.monotonic()
    with open(log, "w") as file:
        # a group and no session: whoever ends the session of this process ends the part with it
        process = subprocess.Popen(command, stdout=file, stderr=file, process_group=0)
        try:
            code = process.wait(max(1, limit))
        except subprocess.TimeoutExpired:
            code = "time"
        finally:  # with the workers of a DataLoader
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    found = {"ok": code == 0, "seconds": time.monotonic() - began}
    if name in ("single", "nine"):
        found |= progress(args, name)
        found["ok"] |= code == "time" and "epochs" in found  # to be extrapolated
    if own.exists():
        found |= json.loads(own.read_text())
    text = log.read_text().strip().splitlines() or [f"status {code}"]
    if code == "time":
        found["stopped"] = f"stopped after {limit:.0f} s"
    elif code:
        found["error"] = text[-1][:300]
    warned = [line for line in text if "no CUDA graph" in line]
    return found | ({"warning": warned[0][:300]} if warned else {})


def markdown(record):
    """The summary, a list of lines."""
    parts = record["parts"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [f"# 4C3F with CLL on {record['device']}", "", f"{versions}; {record['data']}", ""]
    if record["profile"] == "smoke":
        lines += ["Profile smoke: a check of the mechanics; the numbers mean nothing.", ""]
    for name, found in parts.items():
        notes = [found[k] for k in ("result", "stopped", "error", "warning") if k in found]
        state = "ok" if found["ok"] else "FAILED"
        lines.append(f"- {name}: {found['seconds']:.0f} s, {'; '.join([state, *notes])}")
    if "rows" in parts.get("steps", {}):
        lines += ["", *_steps(parts["steps"])]
    textbook = parts.get("baseline", {})
    theirs = textbook.get("extrapolated_s")
    if theirs:
        lines += [
            "",
            f"The textbook way, in PyTorch's default precision: {textbook['step_ms']:.3g} ms a "
            f"step with loading, {textbook['converge_s']:.3g} s of convergence after an epoch "
            f"({textbook['iterations']} iterations); {textbook['epochs']} epochs extrapolated to "
            f"{theirs / 60:.3g} min.",
        ]
    for name in ("single", "nine"):
        if "epochs" in parts.get(name, {}):
            lines += ["", _training(parts[name], theirs)]
    found = parts.get("memory", {})
    if "MiB" in found:
        held = f", {found['reserved_MiB']:.0f} reserved" if "reserved_MiB" in found else ""
        lines += [
            "",
            f"Peak memory of {found['seeds']} stacked seeds: {found['MiB']:.0f} MiB{held}.",
        ]
    return lines


def _steps(found):
    float32, tf32 = (f"{found[k] / 1e12:.3g} TFLOP/s" for k in ("matmul", "matmul_tf32"))
    lines = [
        f"Steps, batch {found['batch']}; a large matrix product reaches {float32} in float32, "
        f"{tf32} in TF32.",
        "",
        "| network | variant | ms | TFLOP/s | of a matrix product |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in found["rows"]:
        rate, share = f"{row['flops'] / 1e12:.3g}", f"{100 * row['utilisation']:.2g} %"
        lines.append(f"| {row['model']} | {row['variant']} | {row['ms']:.3g} | {rate} | {share} |")
    return lines


def _training(found, theirs):
    seeds = f"{found['seeds']} seed{'s' if found['seeds'] > 1 else ''}"
    text = f"{seeds}, {found['epochs']} of {found['of']} epochs: {found['trained_s'] / 60:.3g} min"
    if found["epochs"] < found["of"]:
        text += f", all extrapolated to {found['total_s'] / 60:.3g} min"
    if theirs:
        ratio = found["seeds"] * theirs / found["total_s"]
        text += f"; the textbook way, extrapolated, takes {ratio:.3g} times that"
    if "clean" in found:
        cra = ", ".join(f"{radius} {100 * value:.1f} %" for radius, value in found["cra"].items())
        text += f"; clean {100 * found['clean']:.1f} %, CRA at {cra}"
    return text + "."


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
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.smoke, args.into = args.profile == "smoke", args.into.absolute()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "gpu.py: PyTorch finds no CUDA device; --device cpu --profile smoke checks the script"
        )
    if args.part:
        keep(args, args.part, PARTS[args.part][0](args))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # `attempt` ends its part
    args.into.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(args.into / "runs", ignore_errors=True)  # else training would resume
    record = {"profile": args.profile, **provenance(args.device), "parts": {}}
    record["data"] = images(args).name
    for name in args.only:
        left = args.seconds - END - (time.monotonic() - began)
        found = record["parts"][name] = attempt(args, name, min(PARTS[name][1], left))
        print(f"{name}: {found['seconds']:.0f} s, {'ok' if found['ok'] else 'FAILED'}", flush=True)
        (args.into / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.into / "gpu.md").write_text("\n".join(markdown(record)) + "\n")
    print("\n" + (args.into / "gpu.md").read_text())
    failed = [name for name, found in record["parts"].items() if not found["ok"]]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see {args.into}")


if __name__ == "__main__":
    main()
