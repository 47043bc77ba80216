"""Write and check certificates from the command line, see cll.certify.file."""

import argparse
import sys
from pathlib import Path

from ..data.sources import load
from . import file as certificate
from .run_folder import WEIGHTS, data_arguments, load_model, read_record

EPILOG = """examples:
  python -m cll.certify write outputs/quick/runs/digits-MLP-CLL-seed1-5f893c
  python -m cll.certify verify outputs/quick/runs/digits-MLP-CLL-seed1-5f893c/certificate.json

verify exits with 0 and "certificate holds: ...", with 1 and "certificate fails: ..." naming what is
wrong, or with 2 where it cannot check (a file or the data are missing)."""


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
    checker.add_argument("certificate", type=Path)
    checker.add_argument("--weights", type=Path, help="safetensors file; default: the one it names")
    checker.add_argument("--data", help="source of the images, e.g. npz:PATH; default: as it names")
    checker.add_argument("--images", type=int, metavar="N", help="the first N alone; default: all")
    args = parser.parse_args(arguments)
    try:
        if args.command == "write":
            print(write_run(args.run, args.out, args.data))
            return 0
        options = {"weights": args.weights, "data": args.data, "images": args.images}
        content = certificate.verify(args.certificate, **options, progress=True)
    except certificate.Invalid as error:
        print(f"certificate {'fails' if args.command == 'verify' else 'not written'}: {error}")
        return 1
    except (OSError, ValueError, TypeError) as error:
        print(f"cannot {args.command}: {error}", file=sys.stderr)
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
    source = data_arguments(record["params"])
    source["source"] = data or source["source"]
    options = {"weights": run / WEIGHTS, "source": source, "progress": True}
    out = out or run / "certificate.json"
    return certificate.write(load_model(run), load(**source), out, list(record["cra"]), **options)


if __name__ == "__main__":
    sys.exit(main())
