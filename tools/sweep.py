"""Hand the runs of experiments to many machines, or to this one a few at a time.

    python tools/sweep.py table2 --profile paper --seeds 1-9 --rows T2-05,T2-07 --cluster slurm \\
        --gpus-per-node 1 --time 12:00:00 --slurm partition=gpu
    python tools/sweep.py params/my/run.yaml --profile quick --seeds 1-4 --parallel 2

A job is the command that you would type for its run (--dry-run prints them all); submitit starts it
(extra `cluster`). Runs that have finished, or wait or run under Slurm already, are not submitted;
killed and failed ones are when the command is repeated, and go on from their checkpoint. Slurm puts
a job that reaches its time limit back into the queue, three times. The notebook of the experiment
then reads what has finished. On one machine (--cluster local) this program stays until all is done.
"""

import getpass
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import environment
import parameters

ROOT = parameters.ROOT
DAY = "24:00:00"
UNLIMITED = 60 * 24 * 365  # minutes: submitit has no local job without a limit


class Command:
    """A command line in the form of a submitit job that may be queued again, and then resumes."""

    def __init__(self, line, cwd):
        self.line, self.cwd = line, cwd

    def __call__(self):
        def deaf():  # Slurm's warnings are for submitit, which ends the command and queues it again
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

        subprocess.run(self.line, check=True, cwd=self.cwd, preexec_fn=deaf)

    def checkpoint(self):
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Job(NamedTuple):
    """Runs of one parameter file that train together, as one command: arguments of Python."""

    runs: list
    folders: list
    arguments: list

    def __str__(self):
        return shlex.join(["python", *self.arguments])


def minutes(text):
    """90 of "1:30:00"; also "D-HH:MM:SS" and plain minutes, as Slurm has them."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)|(\d+)", text)
    if not found:
        raise ValueError(f"--time {text}: write HH:MM:SS, D-HH:MM:SS or minutes")
    days, hours, rest, seconds, plain = (int(part or 0) for part in found.groups())
    return plain or 60 * (24 * days + hours) + rest + (seconds > 0)


def planned(what, options):
    """(parameter file, run) of everything that was asked for: names of experiments and files."""
    from cll import experiment, paper

    seeds = parameters.parse_seeds(options.seeds)
    own = {"device": options.device, "data": options.data, "label": options.label}
    if options.rows and what not in ("table1", "table2"):
        raise ValueError(f"--rows is for table1 and table2, not for {what}")
    if what.endswith((".yaml", ".yml")):
        for seed in seeds or [None]:
            yield what, experiment.load_params(what, options.profile, seed=seed, **own)
        return
    if what in ("table1", "table2"):
        runs = experiment.experiment_params(what, options.profile, seeds, device=options.device)
        runs = paper.table_runs(what, runs, options.rows, options.data, options.label)
    else:
        runs = experiment.experiment_params(what, options.profile, seeds, **own)
    for run in runs:
        yield f"params/{what}/{run.name}.yaml", run


def command(file, runs, options):
    """The arguments of Python that train and certify runs of one file."""
    from cll import experiment

    first, path = runs[0], Path(file)
    line = ["-m", "cll"]
    if options.gpus_per_node > 1:
        count = ["--standalone", "--nproc-per-node", options.gpus_per_node]
        line = ["-m", "torch.distributed.run", *count, *line]
    # jobs start in the checkout
    line += [file if (ROOT / path).exists() else path.resolve(), "--profile", options.profile]
    line += ["--seeds", *(run.seed for run in runs)]
    plain = experiment.load_params(file, options.profile)
    given = {"device": options.device}
    if (first.data, first.label) != (plain.data, plain.label):
        given |= {"data": first.data, "label": first.label}
    given["outputs"] = options.outputs or os.environ.get("CLL_OUTPUTS", "")
    if given["outputs"]:
        given["outputs"] = Path(given["outputs"]).expanduser().resolve()
    line += [part for key, value in given.items() if value for part in (f"--{key}", value)]
    return list(map(str, line))


def jobs(options, root):
    """(jobs to submit, number of runs, of those finished, of those under way)."""
    from cll import experiment

    groups, active, seen, done, under_way = {}, None, set(), 0, 0
    for what in options.what:
        for file, run in planned(what, options):
            folder = experiment.run_dir(run, root)
            if folder in seen:
                continue
            seen.add(folder)
            note = folder / "slurm_job"
            if experiment.finished([run], root):
                done += 1
                continue
            if options.cluster == "slurm" and note.exists():
                active = slurm_jobs() if active is None else active
                if note.read_text().strip() in active:
                    under_way += 1
                    continue
            groups.setdefault(file, []).append((run, folder))
    found = []
    for file, members in groups.items():
        for start in range(0, len(members), options.together):
            runs, folders = zip(*members[start : start + options.together], strict=True)
            found.append(Job(runs, folders, command(file, runs, options)))
    return found, len(seen), done, under_way


def slurm_jobs():
    """The ids of the user's jobs that wait or run, elements of arrays one by one."""
    query = ["squeue", "--noheader", "--array", "--format=%i", "--user", getpass.getuser()]
    done = subprocess.run(query, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"squeue: {done.stderr.strip()}")
    return set(done.stdout.split())


def executor(options, root):
    """The submitit executor of the cluster, its logs in a new folder under <root>/jobs."""
    try:
        import submitit
    except ImportError:
        raise OSError("submitit is not installed: pip install -e '.[cluster]'") from None
    logs = root / "jobs" / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    if options.cluster == "local":
        made = submitit.LocalExecutor(logs)
        made.update_parameters(timeout_min=UNLIMITED, gpus_per_node=options.gpus_per_node)
        return made
    made = submitit.SlurmExecutor(logs)
    given = {
        "gpus_per_node": options.gpus_per_node,
        "cpus_per_task": options.cpus_per_task,
        "array_parallelism": options.parallel,
    }
    given = {key: value for key, value in given.items() if value}
    extra = dict(pair.partition("=")[::2] for pair in options.slurm)
    made.update_parameters(
        job_name="cll", time=minutes(options.time), additional_parameters=extra, **given
    )
    return made


def submit_slurm(pending, options, root):
    """Submit the jobs as one array and note their ids in the run folders; 0."""
    queue = executor(options, root)
    with queue.batch():
        submitted = [queue.submit(Command([sys.executable, *j.arguments], ROOT)) for j in pending]
    for job, ticket in zip(pending, submitted, strict=True):
        for folder in job.folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "slurm_job").write_text(f"{ticket.job_id}\n")
        print(f"{ticket.job_id}  {job}")
    print(f"submitted {len(pending)} jobs; logs: {queue.folder}")
    return 0


def run_local(pending, options, root):
    """Run the jobs here, some at a time, each with its own GPUs; the number of failed ones."""
    from cll import experiment

    queue, parallel = executor(options, root), options.parallel or 1
    # jobs beside each other share the cores
    cores = options.cpus_per_task or max(1, (os.cpu_count() or 1) // parallel)
    os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    gpus, waiting, running, failed = options.gpus_per_node, list(pending), {}, 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = list(map(int, visible.split(","))) if visible else list(range(parallel * gpus))
    while waiting or running:
        for slot in set(range(parallel)) - set(running):
            if waiting:
                job = waiting.pop(0)
                queue.update_parameters(visible_gpus=visible[slot * gpus : (slot + 1) * gpus])
                print(f"started  {job}", flush=True)
                ticket = queue.submit(Command([sys.executable, *job.arguments], ROOT))
                running[slot] = job, ticket
        time.sleep(0.2)
        for slot, (job, ticket) in list(running.items()):
            if ticket.done():
                del running[slot]
                if len(experiment.finished(job.runs, root)) == len(job.runs):
                    print(f"finished {job}", flush=True)
                else:
                    failed += 1
                    print(f"FAILED   {job}\n  {reason(ticket)}", file=sys.stderr, flush=True)
    return failed


def reason(ticket):
    """What a failed local job said last itself, and its log; one line."""
    path = ticket.paths.stderr
    text = path.read_text() if path.exists() else ""
    own = text.partition("submitit ERROR")[0].strip().splitlines() or ["killed"]
    return f"{own[-1]} ({path})"


def main(arguments=None):
    parser = environment.parser(__doc__)
    parser.add_argument("what", nargs="+", help="folders of params/, or parameter files")
    parser.add_argument("--profile", required=True, choices=["smoke", "quick", "paper"])
    parser.add_argument("--seeds", default="", help="1,2,3 or 1-9; default: as in the notebook")
    parser.add_argument("--rows", default="", help="rows of table1, table2: T2-05,T2-07")
    for name in ("data", "label", "outputs"):
        parser.add_argument(f"--{name}", default="", help="as for python -m cll")
    parser.add_argument("--device", default="", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--together", type=int, default=1, help="runs of a file in one job")
    parser.add_argument("--cluster", default="local", choices=["local", "slurm"])
    parser.add_argument(
        "--parallel", type=int, help="jobs at a time; default: local 1, slurm as it comes"
    )
    parser.add_argument(
        "--gpus-per-node", type=int, help="for a job; more than one: torchrun; default: 1, "
        "on a machine without GPU 0"
    )  # fmt: skip
    parser.add_argument("--cpus-per-task", type=int, help="for a job")
    parser.add_argument("--time", default=DAY, help=f"for a job under Slurm; default: {DAY}")
    parser.add_argument("--partition", help="of Slurm")
    parser.add_argument(
        "--slurm", action="append", default=[], metavar="NAME=VALUE", help="option of sbatch"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, start nothing")
    options = parser.parse_args(arguments)
    if options.partition:
        options.slurm.append(f"partition={options.partition}")
    if options.gpus_per_node is None:
        options.gpus_per_node = int(options.cluster == "slurm" or environment.cuda_device())
    options.data = parameters.absolute_source(options.data)
    sys.path.insert(0, str(ROOT))
    from cll import experiment

    try:
        for name in ("together", "parallel", "gpus_per_node", "cpus_per_task"):
            least = 0 if name == "gpus_per_node" else 1
            if getattr(options, name) is not None and getattr(options, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be {least} or more")
        minutes(options.time)
        root = experiment.outputs_dir(options.outputs, options.profile)
        pending, total, done, under_way = jobs(options, root)
        queued = f"; under way: {under_way}" if under_way else ""
        print(f"runs: {total}; finished: {done}{queued}; jobs to do: {len(pending)}", flush=True)
        if options.dry_run:
            print("\n".join(map(str, pending)))
            return 0
        if options.cluster == "slurm":
            return submit_slurm(pending, options, root) if pending else 0
        failed = run_local(pending, options, root) if pending else 0
    except (OSError, ValueError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"FAILED sweep: {lines[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("FAILED sweep: interrupted; repeat the command to resume", file=sys.stderr)
        return 1
    if failed:
        print(f"FAILED sweep: {failed} of {len(pending)} jobs; repeat the command, they resume",
              file=sys.stderr)  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
