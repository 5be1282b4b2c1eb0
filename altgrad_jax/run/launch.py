"""Sweeps as jobs of a cluster (SLURM), or of this machine, by submitit: each job trains one slice of the members.

A job that is preempted, or whose time is up, is put into the queue again: its sweep saves every member at SIGTERM, and
goes on from there, to the bit. The members' folders are the only thing that jobs share.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from altgrad_jax.errors import UserError
from altgrad_jax.run.console import tell

JOBS = "jobs"  # in the sweep's folder: submitit's files and what the jobs print
_POLL_S = 0.2
_SAVING_S = 600.0  # that a sweep is given to save its members
_ENDLESS = 10**6  # timeouts after which submitit gives a job up: each goes on from its checkpoints


class Slice:
    """What a job does: runs the command until it ends. submitit calls `checkpoint` when the job is preempted."""

    def __init__(self, command: Sequence[str]):
        self.command, self._process = list(command), None
        # submitit hides GPUs from the jobs of this machine.
        self._visible = os.environ.get("CUDA_VISIBLE_DEVICES")

    def __call__(self) -> int:
        """Returns the exit code of the command."""
        environment = dict(os.environ)
        if environment.get("SUBMITIT_EXECUTOR") == "local":
            environment.pop("CUDA_VISIBLE_DEVICES", None)
            if self._visible is not None:
                environment["CUDA_VISIBLE_DEVICES"] = self._visible
        self._process = subprocess.Popen(self.command, env=environment)
        # Not wait(), whose lock the handler of a signal would wait for without end.
        while self._process.poll() is None:
            time.sleep(_POLL_S)
        return self._process.returncode

    def checkpoint(self) -> Any:
        """Has the command save and end; the same slice, for the next time that the job is run."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()
            self._process.wait(_SAVING_S)
        return DelayedSubmission(Slice(self.command))


def parse_options(text: str) -> dict[str, str | bool]:
    """{option: value} of sbatch's long options, as in `partition=gpu,exclusive`; True for one without a value."""
    options: dict[str, str | bool] = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.strip().lstrip("-").partition("=")
        if not name or equals and not value or name in options:
            raise UserError(
                f"--slurm={text} cannot be used: give sbatch's long options without dashes, each once, joined by "
                "commas, such as partition=gpu,gpus-per-node=1"
            )
        options[name] = value if equals else True
    return options


def flags_of_slice(i: int, jobs: int) -> list[str]:
    """What makes the command of all jobs that of the i-th: of a flag that is given twice the last counts."""
    return ["--launch=none", "--jobs=1", "--slurm=", f"--shard={i}/{jobs}"]


def launch(
    cluster: str,
    command: Sequence[str],
    out: str | Path,
    *,
    jobs: int,
    minutes: int,
    options: Mapping[str, str | bool] | None = None,
) -> int:
    """Starts `jobs` jobs, each the command with its --shard=i/n.

    Args:
      cluster: "slurm", whose jobs are left in its queue; "local", processes of this machine, which are waited for.
      command: the words of a sweep's command, the program first.
      out: folder of the sweep; what the jobs print lies in its folder jobs/.
      minutes: that a job may take before it is saved and put into the queue again.
      options: of sbatch.

    Returns:
      The exit code: 0, or of local jobs the largest.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise UserError("--launch needs submitit: pip install 'altgrad-jax[cluster]'") from None
    folder = Path(out).absolute() / JOBS
    folder.mkdir(parents=True, exist_ok=True)
    endless = {"local_max_num_timeout": _ENDLESS, "slurm_max_num_timeout": _ENDLESS}
    try:
        executor = submitit.AutoExecutor(folder / "%j", cluster=cluster, **endless)
    except RuntimeError as error:  # no sbatch
        raise UserError(f"--launch={cluster} cannot be used here ({error}): give --launch=local") from None
    executor.update_parameters(name=Path(out).name or "sweep", timeout_min=minutes)
    if options:
        executor.update_parameters(slurm_additional_parameters=dict(options))
    slices = [Slice([*command, *flags_of_slice(i, jobs)]) for i in range(1, jobs + 1)]
    started = executor.submit_array(slices)
    names = ", ".join(job.job_id for job in started)
    tell(f"{jobs} jobs of {cluster}: {names}; what they print: {folder}/JOB/")
    if cluster == "slurm":
        tell("squeue --me shows them; a preempted job goes on by itself, and the same command goes on after all ended")
        return 0
    return _wait(started)


def _wait(jobs: Sequence[Any]) -> int:
    """The largest exit code of the jobs, once all have ended; an interrupt ends them first."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    codes = []
    try:
        for i, job in enumerate(jobs, 1):
            try:
                codes.append(job.result())
                tell(f"job {i} of {len(jobs)} ended with exit code {codes[-1]}")
            except (FailedJobError, UncompletedJobError):  # it was killed, say
                codes.append(1)
                tell(f"job {i} of {len(jobs)} ended without a result: see {job.paths.stderr}")
    except KeyboardInterrupt:
        for job in jobs:
            job.cancel()
        raise
    return max(abs(code) for code in codes)


def this_command() -> list[str]:
    """The words with which this process was started, as another process is."""
    return [sys.executable, str(Path(sys.argv[0]).absolute()), *sys.argv[1:]]
