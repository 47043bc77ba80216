"""Train and certify from the command line: python -m cll params/table2/*.yaml --profile smoke.

On several GPUs: torchrun --nproc-per-node 4 -m cll FILE; batch_size stays that of one step over
all of them, and so does the run's identity. After a lost rank the same command resumes.
"""

import argparse
import itertools
import sys

from . import experiment
from .experiment import ranks


def numbers(text):
    """The whole numbers of "4" or "1-3"."""
    first, dash, last = text.partition("-")
    several = range(int(first), int(last if dash else first) + 1)
    if not several:
        raise ValueError
    return several


def main():
    parser = argparse.ArgumentParser(
        prog="python -m cll",
        description="Train and certify runs; finished runs are read, interrupted ones resume.",
    )
    add = parser.add_argument
    add("params", nargs="+", help="parameter files (params/*/*.yaml)")
    add("--profile", choices=experiment.PROFILES, help="default: paper on CUDA, else quick")
    add("--seeds", type=numbers, nargs="+", help="such as 1 4 or 1-3; default: the file's")
    add("--device", choices=["auto", "cpu", "cuda"])
    add("--data", help="data source, e.g. npz:PATH or folder:PATH")
    add("--label", help="how results name that data")
    add("--outputs", default="", help="default: $CLL_OUTPUTS or outputs/")
    text = "certify finished runs of an earlier version anew, from their weights"
    add("--recertify", action="store_true", help=text)
    args = parser.parse_args()
    given = {"device": args.device, "data": args.data, "label": args.label}
    given["seeds"] = list(itertools.chain(*args.seeds or []))
    try:
        runs = [
            run for path in args.params for run in experiment.load_runs(path, args.profile, **given)
        ]
        root = experiment.outputs_dir(args.outputs, runs[-1].profile)
        for run in runs if args.recertify else ():
            experiment.recertify(run, experiment.run_dir(run, root))
        records = experiment.run_all(runs, root)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}" if ranks.is_main() else 1)
    except KeyboardInterrupt:
        sys.exit("interrupted; repeat the command to resume")
    for run, record in zip(runs, records, strict=True) if ranks.is_main() else ():
        cra = "  ".join(f"{name}: {100 * value:.1f} %" for name, value in record["cra"].items())
        print(f"{record['name']} seed {record['seed']} on {record['data']} ({record['profile']})")
        print(f"  clean {100 * record['clean']:.1f} %   CRA {cra}   K {record['K_f']:.4g}")
        print(f"  {experiment.run_dir(run, root)}")
    ranks.close()


if __name__ == "__main__":
    main()
