"""More than one process: torchrun starts them, Hugging Face Accelerate connects them.

    torchrun --nproc-per-node 4 -m cll params/table2/cifar10-CPL-XL-CLL.yaml

Accelerate wraps one module of the loop, whose gradients it averages; a process alone does not
import it. All ranks run the same program on the same random numbers, each on its share of a batch.
Rank 0 alone locks folders, reads the decision where to resume from and writes; run folders lie on
a file system that all ranks see.
"""

import functools
import os
import sys
from datetime import timedelta

import torch

WAIT = timedelta(days=30)  # the others wait while rank 0 certifies; torchrun notices a dead rank


def count():
    """Number of processes that torchrun started with this one; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def is_main():
    """Whether this is the process that writes: the only one, or rank 0."""
    return count() == 1 or os.environ["RANK"] == "0"


@functools.cache
def connect(device):
    """The accelerate.Accelerator of this rank, or None in a process alone; waits for all ranks.
    RuntimeError where accelerate is missing, ValueError where there are fewer GPUs than ranks."""
    if count() == 1:
        return None
    try:
        from accelerate import Accelerator
    except ImportError:
        raise RuntimeError(
            f"{count()} processes need Hugging Face Accelerate: pip install -e '.[distributed]' in "
            "the checkout, or start a single process without torchrun"
        ) from None
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "cuda" and torch.cuda.device_count() < local:
        raise ValueError(
            f"{local} processes on this machine but {torch.cuda.device_count()} CUDA devices: "
            "lower torchrun's --nproc-per-node or use device = 'cpu'"
        )
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=WAIT)
    # mixed_precision: the program's own autocast spares K and the losses
    return Accelerator(cpu=device == "cpu", mixed_precision="no")


def on_main(function, engine):
    """What function() returns on rank 0, on every rank; an error there is raised on every rank.
    engine: from `connect`."""
    if engine is None:
        return function()
    outcome = [None, None]  # value, error
    if engine.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def close():
    """Leave the group of processes, if there is one, and end the program with status 0, without a
    shutdown of the interpreter: worker threads of the group outlive it, and one that then asks for
    the interpreter's lock aborts the process, which torchrun takes for a lost rank
    (github.com/pytorch/pytorch/pull/179291)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
