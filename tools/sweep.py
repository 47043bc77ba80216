"""Hand the runs of experiments to many machines, or to this one a few at a time.

    python tools/sweep.py table2 --profile paper --seeds 1-9 --rows T2-05,T2-07 --cluster slurm \\
        --gpus-per-node 1 --time 12:00:00 --slurm partition=gpu
    python tools/sweep.py params/my/run.yaml --profile quick --seeds 1-4 --parallel 2

A job is the command that you would type for its run (--dry-run prints them all); under Slurm,
submitit starts it (extra `cluster`). Runs that have finished, or wait or run under Slurm already,
are not submitted; killed and failed ones are when the command is repeated, and go on from their
checkpoint. Slurm puts a job that reaches its time limit back into the queue, three times. The
notebook of the experiment then reads what has finished. On one machine (--cluster local) this
program stays until all is done.
"""

import dataclasses
import getpass
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import environment  # tools/ is on the path: this file is run as a script
import parameters

ROOT = parameters.ROOT
sys.path.insert(0, str(ROOT))
from cll import experiment  # noqa: E402
from paper import tables  # noqa: E402

DAY = "24:00:00"


@dataclasses.dataclass
class Job:
    """Runs of one parameter file that train together, as one command: arguments of Python. For
    submitit it is a function that may be queued again, and then resumes."""

    folders: list
    arguments: list

    def __str__(self):
        return shlex.join(["python", *self.arguments])

    def __call__(self):
        def deaf():  # Slurm's warnings are for submitit, which ends the command and queues it again
            for warning in (signal.SIGUSR2, signal.SIGTERM):
                signal.signal(warning, signal.SIG_IGN)

        command = [sys.executable, *self.arguments]
        subprocess.run(command, check=True, cwd=ROOT, preexec_fn=deaf)

    def checkpoint(self):
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def minutes(text):
    """90 of "1:30:00"; also "D-HH:MM:SS" and plain minutes, as Slurm has them."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)|(\d+)", text)
    if not found:
        raise ValueError(f"--time {text}: write HH:MM:SS, D-HH:MM:SS or minutes")
    days, hours, rest, seconds, plain = (int(part or 0) for part in found.groups())
    return plain or 60 * (24 * days + hours) + rest + (seconds > 0)


def planned(what, options):
    """(parameter file, run) of everything that was asked for: names of experiments and files."""
    seeds = parameters.parse_seeds(options.seeds)
    given = {"device": options.device, "data": options.data, "label": options.label}
    if options.rows and what not in ("table1", "table2"):
        raise ValueError(f"--rows is for table1 and table2, not for {what}")
    if what.endswith((".yaml", ".yml")):
        for run in experiment.load_runs(what, options.profile, seeds, **given):
            yield what, run
        return
    if what in ("table1", "table2"):
        runs = tables.runs(what, options.profile, seeds, options.rows, **given)
    else:
        runs = experiment.experiment_params(what, options.profile, seeds, **given)
    for run in runs:
        yield f"params/{what}/{run.name}.yaml", run


def command(file, runs, options):
    """The arguments of Python that train and certify runs of one file."""
    first, path = runs[0], Path(file)
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", options.gpus_per_node]
    line = ["-m", *(several + ["-m"]) * (options.gpus_per_node > 1), "cll"]
    # jobs start in the checkout
    line += [file if (ROOT / path).exists() else path.resolve(), "--profile", options.profile]
    line += ["--seeds", *(run.seed for run in runs)]
    plain = experiment.load_params(file, options.profile)
    given = {"device": options.device}
    if (first.data, first.label) != (plain.data, plain.label):
        given |= {"data": first.data, "label": first.label}
    if outputs := options.outputs or os.environ.get("CLL_OUTPUTS"):
        given["outputs"] = Path(outputs).expanduser().resolve()
    line += [part for key, value in given.items() if value for part in (f"--{key}", value)]
    return list(map(str, line))


def jobs(options, root):
    """(jobs to submit, number of runs, of those finished, of those under way)."""
    asked = {}
    for what in options.what:
        for file, run in planned(what, options):
            asked.setdefault(experiment.run_dir(run, root), (file, run))
    left = {f: item for f, item in asked.items() if not experiment.finished(item[1:], root)}
    notes = [folder / "slurm_job" for folder in left] if options.cluster == "slurm" else []
    notes = {note.parent: note.read_text().strip() for note in notes if note.exists()}
    active = slurm_jobs() if notes else set()
    under_way = {folder for folder, number in notes.items() if number in active}
    groups, pending = {}, []
    for folder, (file, run) in left.items():
        if folder not in under_way:
            groups.setdefault(file, []).append((run, folder))
    for file, members in groups.items():
        for start in range(0, len(members), options.together):
            runs, folders = zip(*members[start : start + options.together], strict=True)
            pending.append(Job(folders, command(file, runs, options)))
    return pending, len(asked), len(asked) - len(left), len(under_way)


def slurm_jobs():
    """The ids of the user's jobs that wait or run, elements of arrays one by one."""
    query = ["squeue", "--noheader", "--array", "--format=%i", "--user", getpass.getuser()]
    done = subprocess.run(query, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"squeue: {done.stderr.strip()}")
    return set(done.stdout.split())


def submit_slurm(pending, options, root):
    """Submit the jobs as one array and note their ids in the run folders; 0."""
    try:
        import submitit
    except ImportError:
        raise OSError("submitit is not installed: pip install -e '.[cluster]'") from None
    queue = submitit.SlurmExecutor(root / "jobs")
    given = {"gpus_per_node": options.gpus_per_node, "cpus_per_task": options.cpus_per_task}
    given["array_parallelism"] = options.parallel
    queue.update_parameters(
        job_name="cll",
        time=minutes(options.time),
        additional_parameters=dict(pair.partition("=")[::2] for pair in options.slurm),
        **{key: value for key, value in given.items() if value},
    )
    with queue.batch():
        submitted = list(map(queue.submit, pending))
    for job, ticket in zip(pending, submitted, strict=True):
        for folder in job.folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "slurm_job").write_text(f"{ticket.job_id}\n")
        print(f"{ticket.job_id}  {job}")
    print(f"submitted {len(pending)} jobs; logs: {queue.folder}")
    return 0


def run_local(pending, options, root):
    """Run the jobs here, some at a time, each with its own GPUs; the number of failed ones."""
    parallel, gpus = options.parallel or 1, options.gpus_per_node
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = visible.split(",") if visible else list(map(str, range(parallel * gpus)))
    free = [",".join(visible[i * gpus : (i + 1) * gpus]) for i in range(parallel)]
    # jobs beside each other share the cores, and their bars would overwrite each other
    cores = options.cpus_per_task or max(1, (os.cpu_count() or 1) // parallel)
    shared = {"OMP_NUM_THREADS": str(cores), "TQDM_DISABLE": "1"} | os.environ

    def failed(job):
        print(f"started  {job}", flush=True)
        devices, command = free.pop(), [sys.executable, *job.arguments]
        done = subprocess.run(command, cwd=ROOT, env=shared | {"CUDA_VISIBLE_DEVICES": devices})
        free.append(devices)
        if done.returncode:  # of an error the job has said what it is; a signal is negative
            print(f"FAILED   {job}: status {done.returncode}", file=sys.stderr, flush=True)
        return done.returncode != 0

    with ThreadPoolExecutor(parallel) as pool:
        return sum(pool.map(failed, pending))


COUNTS = {  # option: (least, help)
    "together": (1, "runs of a file in one job; default: 1"),
    "parallel": (1, "jobs at a time; default: local 1, slurm as it comes"),
    "gpus-per-node": (0, "for a job; more than one: torchrun; default: 1, on a machine without: 0"),
    "cpus-per-task": (1, "for a job"),
}


def parsed(arguments):
    """The options of the command line; ValueError for numbers that make no sense."""
    parser = environment.parser(__doc__)
    parser.add_argument("what", nargs="+", help="folders of params/, or parameter files")
    parser.add_argument("--profile", required=True, choices=["smoke", "quick", "paper"])
    parser.add_argument("--device", default="", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--cluster", default="local", choices=["local", "slurm"])
    for name, text in parameters.OPTIONS.items():
        parser.add_argument(f"--{name}", default="", help=text)
    parser.add_argument("--partition", action="append", dest="slurm", type="partition={}".format)
    for name, (_, text) in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--time", default=DAY, help=f"for a job under Slurm; default: {DAY}")
    parser.add_argument("--slurm", action="append", default=[], metavar="NAME=VALUE",
                        help="option of sbatch")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the commands, start nothing")
    parser.set_defaults(together=1)
    options = parser.parse_args(arguments)
    for name, (least, _) in COUNTS.items():
        count = getattr(options, name.replace("-", "_"))
        if count is not None and count < least:
            raise ValueError(f"--{name} must be {least} or more")
    minutes(options.time)
    if options.gpus_per_node is None:
        options.gpus_per_node = int(options.cluster == "slurm" or environment.cuda_device())
    options.data = parameters.absolute_source(options.data)
    return options


def main(arguments=None):
    try:
        options = parsed(arguments)
        root = experiment.outputs_dir(options.outputs, options.profile)
        pending, total, done, under_way = jobs(options, root)
        queued = f"; under way: {under_way}" if under_way else ""
        print(f"runs: {total}; finished: {done}{queued}; jobs to do: {len(pending)}", flush=True)
        if options.dry_run:
            print("\n".join(map(str, pending)))
            return 0
        start = submit_slurm if options.cluster == "slurm" else run_local
        count = start(pending, options, root) if pending else 0
        trouble = f"{count} of {len(pending)} jobs; repeat the command, they resume" * bool(count)
    except (OSError, ValueError, RuntimeError) as error:
        trouble = (str(error).strip().splitlines() or [type(error).__name__])[0]
    except KeyboardInterrupt:
        trouble = "interrupted; repeat the command to resume"
    if trouble:
        print(f"FAILED sweep: {trouble}", file=sys.stderr)
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main())
