"""Write and check certificates from the command line, see cll.certify.file."""

import argparse
import sys
from pathlib import Path

from ..data.sources import load
from . import file as certificate
from .run_folder import WEIGHTS, in_order, load_model, read_record

EPILOG = """examples:
  python -m cll.certify write outputs/quick/runs/digits-MLP-CLL-seed1-5f893c
  python -m cll.certify verify outputs/quick/runs/digits-MLP-CLL-seed1-5f893c/certificate.json

verify exits with 0 and "certificate holds: ...", with 1 and "certificate fails: ..." naming what is
wrong, or with 2 where it cannot check (a file or the data are missing). A certificate names its
weights by their path from its folder: send both, or give their path to the reader for --weights."""


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m cll.certify",
        description="Write the certificate of a finished run, or check one.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    writer = commands.add_parser("write", help="certify a finished run: RUN/certificate.json")
    writer.add_argument("run", type=Path, help="folder with result.json, checkpoint.safetensors")
    writer.add_argument("--data", help="source of its images, e.g. npz:PATH; default: its own")
    writer.add_argument("--out", type=Path, help="default: certificate.json in that folder")
    checker = commands.add_parser("verify", help="check a certificate, believing nothing in it")
    checker.add_argument("path", type=Path, metavar="certificate")
    checker.add_argument("--weights", type=Path, help="safetensors file; default: the one it names")
    checker.add_argument("--data", help="source of the images, e.g. npz:PATH; default: as it names")
    checker.add_argument("--images", type=int, metavar="N", help="the first N alone; default: all")
    args = vars(parser.parse_args(arguments))
    command = args.pop("command")
    try:
        if command == "write":
            print(write_run(**args))
            return 0
        content = certificate.verify(**args, progress=True)
    except certificate.Invalid as error:
        print(f"certificate {'fails' if command == 'verify' else 'not written'}: {error}")
        return 1
    except (OSError, ValueError, TypeError) as error:
        print(f"cannot {command}: {error}", file=sys.stderr)
        return 2
    checked = content["checked"]
    cra = ", ".join(f"{name}: {100 * value:.2f} %" for name, value in checked["cra"].items())
    some = "all" if checked["images"] == checked["of"] else f"the first {checked['images']} of"
    print(
        f"certificate holds: {len(content['bounds'])} layers, largest K "
        f"{max(map(max, content['K'])):.6g}, {some} {checked['of']} images; clean "
        f"{100 * checked['clean']:.2f} %, certified at {cra}\n"
        f"read: weights {checked['weights']}; images {checked['data']}"
    )
    return 0


def write_run(run, out=None, data=None):
    """Write the certificate of the weights in a run folder; returns its path. data: the source of
    the images, where it is not the run's."""
    record = read_record(run)
    params = record["params"]
    source = {"source": data or params["data"], "input_shape": list(params["input_shape"])}
    source |= {key: params[key] for key in ("train_size", "test_size")}
    source |= {"seed": params["seed"]} if params["data"] == "two_moons" else {}
    model, out = load_model(run), out or run / "certificate.json"
    weights = run / WEIGHTS if in_order(run / WEIGHTS) else None  # or those of the model, converted
    options = {"radii": list(record["cra"]), "weights": weights, "source": source}
    return certificate.write(model, load(**source), out, **options, progress=True)


if __name__ == "__main__":
    sys.exit(main())
