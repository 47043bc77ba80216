"""Execute one notebook with papermill and export it as HTML.

    python tools/execute.py notebooks/table2.ipynb outputs/quick/table2 --params FILE.yaml

leaves <out>/table2.ipynb (executed), table2.html and run.log. The first line says profile and
device, the notebook's own output follows live, the last line says what was written. A failure is
one line on stderr that names the culprit; its traceback is in run.log and in
<out>/table2.partial.ipynb. The notebook of an earlier success is replaced only by a new success.

exit status: 0 done; 1 failed; 130 interrupted; 143 terminated
"""

import contextlib
import fcntl
import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import environment  # tools/ is on the path: this file is run as a script
import pages
import yaml

ROOT = Path(__file__).resolve().parent.parent
GRACE_SECONDS = 10  # an interrupted cell gets this long to leave its files in order
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
WIDGET = "application/vnd.jupyter.widget-view+json"
INTERNAL = {"run.log", "params.yaml", ".lock"}
DEATHS = {
    -signal.SIGKILL: "killed, most likely because memory ran out: free some, or use fewer SEEDS",
    -signal.SIGSEGV: "segmentation fault in a compiled library",
    -signal.SIGABRT: "aborted by a compiled library",
    -signal.SIGTERM: "terminated from outside",
}


class Failure(Exception):
    """A failure whose message is complete as it stands: one line, shown without a traceback."""


class Log:
    """A text stream that copies what is written to it to the terminal and to run.log. Carriage
    returns (progress bars) overwrite the line on a terminal and start a new one in files."""

    def __init__(self, path):
        Path(path).write_text("")
        # appends, as do the kernel's own messages and the libraries' log, so that none overwrites
        self.file = open(path, "a", encoding="utf-8")
        self.live = sys.stdout.isatty()
        self.at_line_start = True

    def write(self, text):
        plain = re.sub(r"\r+\n?", "\n", ANSI.sub("", text)).lstrip("\n" * self.at_line_start)
        self.file.write(plain)
        self.file.flush()
        with contextlib.suppress(BrokenPipeError):  # the reader left: the run goes on
            sys.stdout.write(text if self.live else plain)
            sys.stdout.flush()
        if text:
            self.at_line_start = text.endswith(("\n", "\r"))

    def flush(self):
        pass  # write() flushes: a reader of run.log sees every line at once

    def end_line(self):
        if not self.at_line_start:
            self.write("\n")


def shown(path):
    """The path as the user would type it: relative to the current folder where it lies inside."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def prepare_kernel_environment(jobs):
    """Environment that the kernel inherits: this checkout, this Python, plain progress bars."""
    os.environ["CLL_HEADLESS"] = "1"
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)
    if jobs:
        os.environ["OMP_NUM_THREADS"] = str(jobs)


def kernel_class(log=None, kernels=None, python=sys.executable):
    """The class of a kernel on a Python. No registered kernel is consulted, so a `python3` kernel
    of another environment in JUPYTER_PATH cannot take its place. log: if it has a `file`, the
    kernel's own messages go there. kernels: list that receives its process (subprocess.Popen)."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    launch = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]

    class Kernel(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=launch, display_name="Python 3", language="python")

        async def start_kernel(self, **options):
            file = getattr(log, "file", subprocess.DEVNULL)
            await super().start_kernel(stdout=file, stderr=file, **options)
            if kernels is not None:
                kernels.append(self.provisioner.process)

    return Kernel


def execute(notebook, output, parameters=None, log=None, kernels=None, kernel=None):
    """Run a notebook (paths), write the executed one to `output`; returns its NotebookNode.

    log: text stream for the notebook's output. kernels: as in kernel_class. kernel: a kernel class;
    or a kernel that goes on afterwards, on which the next notebook sees no names of this one but
    does not import its modules again. Raises papermill's exception for a cell that raises, Failure
    for a kernel that dies and for a notebook that stops early.
    """
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook

    kernels = [] if kernels is None else kernels
    kernel = kernel or kernel_class(log, kernels)
    given = {"kernel_manager_class": kernel} if isinstance(kernel, type) else {"km": kernel}
    if getattr(kernel, "has_kernel", None) is True:
        client = kernel.blocking_client()
        client.start_channels()
        client.execute("get_ipython().reset()", silent=True, reply=True, timeout=60)
        client.stop_channels()
    try:
        nb = execute_notebook(
            Path(notebook).resolve(),
            Path(output).resolve(),
            parameters=parameters,
            kernel_name="python3",
            language="python",
            cwd=Path(notebook).resolve().parent,
            progress_bar=False,
            log_output=False,
            stdout_file=log,
            stderr_file=log,
            autosave_cell_every=60,
            start_timeout=300,
            extra_arguments=["--IPKernelApp.log_level=40"],  # no warning about local TCP
            coalesce_streams=True,
            **given,
        )
    except DeadKernelError:
        code = kernels[-1].wait(timeout=10) if kernels else None
        raise Failure(f"the kernel died: {DEATHS.get(code, f'exit status {code}')}") from None
    for number, cell in enumerate(nb.cells):
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            raise Failure(f"cell {number} did not run: a cell before it calls exit()")
    return nb


def reproducible(nb, *folders):
    """The text of an executed notebook without what differs from run to run: times, progress bars
    and random ids. Raises Failure if it names the checkout, the home folder or one of `folders`."""
    import nbformat

    kept = {key: nb.metadata[key] for key in ("accelerator", "kernelspec") if key in nb.metadata}
    nb.metadata = nbformat.from_dict(kept | {"language_info": {"name": "python"}})
    for cell in nb.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if "injected-parameters" in (tags or ()):
            cell.id, cell.source = "injected-parameters", cell.source.strip()
        if "outputs" in cell:
            cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {})]
    text = nbformat.writes(nb) + "\n"
    for folder in {str(ROOT), str(Path.home()), *folders} - {"/"}:
        if folder in text:
            raise Failure(f"its output names the folder {folder}: print relative paths")
    return text


def reason(error):
    """What went wrong, as one line."""
    text = " ".join(ANSI.sub("", str(getattr(error, "evalue", error))).split())
    if isinstance(error, Failure):
        return text
    return f"{getattr(error, 'ename', type(error).__name__)}: {text}".rstrip(": ")


def interruptible(task, *given):
    """task(*given, kernels) in a thread, so that Ctrl-C reaches this function and not nbclient's
    handler, which would report an interrupted notebook as complete. Interrupts the kernel, then
    kills it."""
    kernels = []
    running = ThreadPoolExecutor(1).submit(task, *given, kernels)
    try:
        return running.result()
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C does not wait
            for process in kernels:
                process.send_signal(signal.SIGINT)
            wait([running], GRACE_SECONDS if kernels else 0)
        for process in kernels:
            if process.poll() is None:
                process.kill()
        raise


def headline(name, parameters, auto):
    """`table2: profile quick (no CUDA device found; ...), device cpu`."""
    profile, device = parameters.get("profile", "unknown"), parameters.get("device", "auto")
    there = "a CUDA device is there; PROFILE=quick takes minutes"
    none = "no CUDA device found; PROFILE=paper runs the published schedule"
    why = f" ({there if profile == 'paper' else none})" * auto
    if device == "auto":
        device = "cuda" if environment.cuda_device() else "cpu"
    more = {key: parameters.get(key) for key in ("seeds", "seed", "rows", "data")}
    more = "".join(f", {key} {value}" for key, value in more.items() if value)
    return f"{name}: profile {profile}{why}, device {device}{more}"


def quiet_libraries(log_path):
    """papermill, nbclient and nbconvert log to run.log; nothing of theirs reaches the terminal."""
    warnings.simplefilter("ignore")
    logging.basicConfig(filename=log_path, format="%(name)s: %(message)s", force=True)
    logging.captureWarnings(True)


@contextlib.contextmanager
def locked(folder):
    """Two processes never write the same partial notebook: the second fails at once."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            why = f"another process is writing {shown(folder)}; wait for it, or choose OUT=FOLDER"
            raise Failure(why) from None
        yield


def run(options):
    """Execute and export one notebook; returns the exit status."""
    started, notebook, out = time.time(), Path(options.notebook), Path(options.out)
    name, log = notebook.stem, None
    try:
        if options.jobs and not (options.jobs.isdigit() and int(options.jobs) > 0):
            raise Failure(f"JOBS={options.jobs}: write a number of CPU threads, such as 4")
        text = Path(options.params).read_text(encoding="utf-8") if options.params else ""
        parameters = yaml.safe_load(text) or {}
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            log = Log(out / "run.log")
            log.write(headline(name, parameters, options.auto) + "\n")
            quiet_libraries(out / "run.log")
            prepare_kernel_environment(options.jobs)
            partial = out / f"{name}.partial.ipynb"
            nb = interruptible(execute, notebook, partial, parameters, log)
            os.replace(partial, out / f"{name}.ipynb")
            body = pages.notebook_body(nb)
            environment.write(out / f"{name}.html", pages.page(pages.opening(nb, name)[0], body))
        log.end_line()
        new = [p.name for p in sorted(out.iterdir()) if p.is_file() and p.name not in INTERNAL]
        new = [f for f in new if f != f"{name}.html" and (out / f).stat().st_mtime >= started]
        listed = ", ".join(new) if len(new) <= 4 else f"{len(new)} files beside it"
        more = f" (and {listed})" if new else ""
        seconds = f"{time.time() - started:.0f} s"
        log.write(f"{name}: wrote {shown(out / name)}.html{more} in {seconds}\n")
        return 0
    except KeyboardInterrupt:
        if log:
            log.end_line()
        print("interrupted; repeat the command to resume", file=sys.stderr)
        return 130
    except Exception as error:
        where = ""
        if log:
            log.end_line()
            log.file.write(f"{ANSI.sub('', str(error))}\n")
            log.file.flush()
            where = f" (full log: {shown(out / 'run.log')}; repeat the command to resume)"
        print(f"FAILED {name}: {reason(error)}{where}", file=sys.stderr)
        return 1


def main(arguments=None):
    parser = environment.parser(__doc__)
    parser.add_argument("notebook", help="the source notebook; never changed")
    parser.add_argument("out", help="folder for the executed notebook, the report and run.log")
    parser.add_argument("--params", help="YAML file with values for the notebook's parameters cell")
    parser.add_argument("--jobs", default="", help="CPU threads; default: as the libraries choose")
    parser.add_argument("--auto", action="store_true", help="the profile was chosen by make")
    options = parser.parse_args(arguments)
    terminated = []

    def on_sigterm(*_):  # a batch system's time limit: leave the same way as Ctrl-C
        # make passes on the signal that its whole group got already: one is enough
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        terminated.append(True)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, on_sigterm)
    status = run(options)
    return 143 if terminated and status == 130 else status


if __name__ == "__main__":
    status = main()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(status)  # nbclient's exit handlers would wait for a kernel that is already gone
