"""Train and certify from the command line: python -m cll params/table2/*.yaml --profile smoke.

On several GPUs: torchrun --nproc-per-node 4 -m cll FILE; batch_size stays that of one step over
all of them, and so does the run's identity. After a lost rank the same command resumes.
"""

import argparse
import sys

from .experiment import PROFILES, load_params, outputs_dir, ranks, recertify, run_all, run_dir


def main():
    parser = argparse.ArgumentParser(
        prog="python -m cll",
        description="Train and certify runs; finished runs are read, interrupted ones resume.",
    )
    parser.add_argument("params", nargs="+", help="parameter files (params/*/*.yaml)")
    parser.add_argument("--profile", choices=PROFILES, help="default: paper on CUDA, else quick")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the file's seed")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--data", help="data source, e.g. npz:PATH or folder:PATH")
    parser.add_argument("--label", help="how results name that data")
    parser.add_argument("--outputs", default="", help="default: $CLL_OUTPUTS or outputs/")
    parser.add_argument(
        "--recertify",
        action="store_true",
        help="certify finished runs of an earlier version anew, from their weights",
    )
    args = parser.parse_args()
    overrides = {"device": args.device, "data": args.data, "label": args.label}
    try:
        runs = [
            load_params(path, args.profile, seed=seed, **overrides)
            for path in args.params
            for seed in args.seeds or [None]
        ]
        for params in runs:
            root = outputs_dir(args.outputs, params.profile)
        if args.recertify:
            for params in runs:
                recertify(params, run_dir(params, root))
        records = run_all(runs, root)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}" if ranks.is_main() else 1)
    except KeyboardInterrupt:
        sys.exit("interrupted; repeat the command to resume")
    for params, record in zip(runs, records, strict=True) if ranks.is_main() else ():
        cra = "  ".join(f"{name}: {100 * value:.1f} %" for name, value in record["cra"].items())
        print(f"{record['name']} seed {record['seed']} on {record['data']} ({record['profile']})")
        print(f"  clean {100 * record['clean']:.1f} %   CRA {cra}   K {record['K_f']:.4g}")
        print(f"  {run_dir(params, root)}")
    ranks.close()


if __name__ == "__main__":
    main()
