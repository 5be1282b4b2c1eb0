"""Bad input of every kind, given to the program, and how it answers.

An answer is right only if all of this holds:

- In process a UserError; on the command line exit code 2 and one `error: ...` on stderr, without a traceback.
- Its message is one line (or, of several wrong settings, a line for each), holds the wrong value or the name of what
  is wrong, and says what to do.
- Nothing was written: the listing of the case's folder and of the working folder, with sizes and hashes, is the same
  before and after.
- It came within the time limit.

Some inputs are odd but harmless, such as an archive whose members have paths that lead outside: those may be accepted,
and only what they leave outside the place for output counts. And settings at the edges of their ranges must be
accepted; one that is not counts as refused wrongly.

`run` makes every input in a folder of its own and gives it to the program in a thread, or to a script in a process.
What the inputs are: strategies (settings, drawn from the limits of the fields) and bad_files (a catalogue).
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import re
import shutil
import stat
import subprocess
import threading
import time
import traceback
from pathlib import Path

from altgrad_jax import config as settings
from altgrad_jax.errors import UserError
from campaigns import bad_files, strategies
from campaigns.case import ROOT, Case, Script
from campaigns.runs import Part, table

LIMIT_S = 60.0  # a script has to start jax; in process half of it
WRONG = ("tracebacks", "hangs", "accepted wrongly", "half-written", "unclear", "refused wrongly")
_VERBS = (
    "give",
    "set",
    "use",
    "choose",
    "prepare",
    "run",
    "fetch",
    "check",
    "restore",
    "start",
    "write",
    "add",
    "make",
    "convert",
    "delete",
    "unpack",
    "name",
    "download",
    "cut",
    "keep",
    "leave",
    "change",
    "mean",
    "install",
    "lists",
    "must",
    "bring",
    "move",
    "needs",
    "need",
    "ask",
    "look",
    "see",
    "mend",
    "count",
    "decode",
    "fails",
)


@dataclasses.dataclass
class Row:
    """Counts of one kind. given = answered + all of WRONG."""

    kind: str
    given: int = 0
    answered: int = 0
    wrong: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(WRONG, 0))
    slowest_s: float = 0.0


@dataclasses.dataclass
class Outcome:
    """What `run` returns. failures: (kind, input, which of WRONG, what happened) of every answer that was not right."""

    rows: list[Row]
    failures: list[tuple[str, str, str, str]]

    @property
    def given(self):
        return sum(row.given for row in self.rows)

    @property
    def answered(self):
        return sum(row.answered for row in self.rows)

    def table(self):
        """Cells of a table, headings first, the sum last."""
        lines = [("kind of input", "given", "answered", *WRONG, "slowest s")]
        for row in self.rows:
            lines.append((row.kind, row.given, row.answered, *row.wrong.values(), f"{row.slowest_s:.2f}"))
        sums = [sum(row.wrong[key] for row in self.rows) for key in WRONG]
        slowest = max((row.slowest_s for row in self.rows), default=0.0)
        return [*lines, ("all", self.given, self.answered, *sums, f"{slowest:.2f}")]

    def part(self):
        """The campaign's Part."""
        head, *rows = self.table()
        failures = [f"{kind}, {what}: {wrong}: {happened}" for kind, what, wrong, happened in self.failures]
        return Part("Bad input", table(head, rows), self.given, self.given, failures)


# ------------------------------------------------------------------------------------------------------- one case


def listing(folder):
    """{path below folder: what is there}: type, size and sha256 of files, target of links; nothing is followed."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            status = path.lstat()
            what = (stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode))
            if stat.S_ISREG(status.st_mode):
                what += (status.st_size, hashlib.sha256(path.read_bytes()).hexdigest())
            elif stat.S_ISLNK(status.st_mode):
                what += (os.readlink(path),)
            found[str(path.relative_to(folder))] = what
    return found


def _call(function, limit_s):
    """("returned" | "raised" | "hang", exception or None). In a thread, which a hang leaves behind."""
    ended = []

    def work():
        try:
            function()
            ended.append(("returned", None))
        except BaseException as error:  # whatever it is, it is what has to be judged
            ended.append(("raised", error))

    thread = threading.Thread(target=work, name="bad-input", daemon=True)
    thread.start()
    thread.join(limit_s)
    return ended[0] if ended else ("hang", None)


def _refusal_of_call(function, limit_s):
    """(which of WRONG or None, message or what happened); message None: it was accepted."""
    how, error = _call(function, limit_s)
    if how == "hang":
        return "hangs", f"no answer within {limit_s:.0f} s"
    if how == "returned":
        return None, None
    if isinstance(error, UserError):
        return None, str(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    return "tracebacks", f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"


def _refusal_of_script(script, here, limit_s):
    # One thread of BLAS, for each takes address space.
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        script.command,
        cwd=here,
        env=environ,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        _, stderr = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "hangs", f"no answer within {limit_s:.0f} s"
    if process.returncode == 0:
        return None, None
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    if "Traceback" in stderr or process.returncode != 2:
        return "tracebacks", f"exit code {process.returncode}: {stderr.strip()[-300:]}"
    if len(errors) != 1:
        return "unclear", f"{len(errors)} lines begin with `error: `: {stderr.strip()[-300:]}"
    return None, stderr[stderr.index("error: ") + len("error: ") :].rstrip("\n")


def _unclear(message, names):
    """What is missing in a refusal, or None."""
    lines = message.splitlines()
    one_each = re.match(r"(?:member \S+: )?(\d+) settings cannot be used:", lines[0] if lines else "")
    if not lines or len(lines) != (int(one_each[1]) + 1 if one_each else 1):
        return f"{len(lines)} lines: {message[:300]}"
    if not message.isprintable() and not one_each:
        return f"it holds what cannot be printed: {message[:300]!r}"
    missing = [name for name in names if name not in message]
    if missing:
        return f"it does not hold {missing[0]!r}: {message[:300]}"
    if not re.search(rf"\b({'|'.join(_VERBS)})\b", message):
        return f"it does not say what to do: {message[:300]}"
    return None


def judge(case, folder, here, limit_s=LIMIT_S):
    """Gives one case to the program. Returns (None or which of WRONG, what happened).

    Args:
      folder: to make for the case, and to remove. here: the working folder, which must not change.
    """
    folder.mkdir()
    try:
        given = case.make(folder)
        before = listing(folder), listing(here)
        with contextlib.redirect_stdout(io.StringIO()):
            if isinstance(given, Script):
                wrong, message = _refusal_of_script(given, here, limit_s)
            else:
                wrong, message = _refusal_of_call(given, limit_s / 2)
        after = listing(folder), listing(here)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if wrong:
        return wrong, message
    if case.expected == "accepted":
        return (None, "") if message is None else ("refused wrongly", message[:300])
    if case.expected == "harmless":
        after = ({path: what for path, what in after[0].items() if path.split("/")[0] != "out"}, after[1])
    elif message is None:
        return "accepted wrongly", "it was accepted"
    if before != after:
        changed = sorted(
            path
            for old, new in zip(before, after)
            for path in old.keys() | new.keys()
            if old.get(path) != new.get(path)
        )
        return "half-written", f"changed: {', '.join(changed[:4])}"
    problem = message is not None and _unclear(message, [name.replace("{folder}", str(folder)) for name in case.names])
    return ("unclear", problem) if problem else (None, message or "")


# ------------------------------------------------------------------------------------------------------- the campaign


def config_cases(seed, n):
    """n wrong values of settings, and for every three of those one at an edge of its limits or inside."""
    cases = []
    for bad in strategies.draw(strategies.bad_values(), n, of_seed=seed):
        kind = "setting: by a flag" if bad.is_flag else "setting: from Python"
        what = f"{bad.name}: {settings.show(bad.value)} ({type(bad.value).__name__})"
        config_file = str(ROOT / "configs" / "smoke.py")
        cases.append(Case(kind, what, lambda folder, bad=bad: lambda: strategies.give(bad, config_file), (bad.name,)))
    for name, value in strategies.draw(strategies.good_values(), n // 3, of_seed=seed):

        def accept(name=name, value=value):
            if problem := settings.problem(settings.FIELDS[name], value):
                raise UserError(problem)

        kind = "setting inside its limits: to be accepted"
        cases.append(Case(kind, f"{name}={settings.show(value)}", lambda folder, a=accept: a, expected="accepted"))
    return cases


def all_cases(seed, n, *, every, originals):
    """Every case: those of the settings, n of them wrong values, and each `every`-th of the catalogue.

    originals: folder for what cases copy.
    """
    return [*config_cases(seed, n), *bad_files.cases(originals)[::every]]


def run(folder, *, seed, n, every=1, limit_s=LIMIT_S, say=print):
    """Gives every bad input to the program.

    Args:
      folder: to work in; made where it is missing; left as it was found.
      seed: decides the generated settings. n: how many wrong values of settings are generated.
      every: of the catalogue, only each `every`-th case is taken.
      limit_s: seconds that a script may take; a call half of that.

    Returns:
      Outcome. Two inputs of one kind and words count once.
    """
    folder = Path(folder).absolute()
    work = folder / "bad-inputs"
    here = work / "here"
    here.mkdir(parents=True)
    (work / "originals").mkdir()
    rows, failures, seen = {}, [], set()
    back = os.getcwd()
    try:
        os.chdir(here)
        for number, case in enumerate(all_cases(seed, n, every=every, originals=work / "originals")):
            if (case.kind, case.what) in seen:
                continue
            seen.add((case.kind, case.what))
            started = time.monotonic()
            wrong, happened = judge(case, work / f"case-{number}", here, limit_s)
            row = rows.setdefault(case.kind, Row(case.kind))
            row.given += 1
            row.slowest_s = max(row.slowest_s, time.monotonic() - started)
            if wrong:
                row.wrong[wrong] += 1
                failures.append((case.kind, case.what, wrong, happened))
                say(f"{case.kind}: {case.what}: {wrong}: {happened}")
            else:
                row.answered += 1
    finally:
        os.chdir(back)
        shutil.rmtree(work, ignore_errors=True)
    outcome = Outcome(list(rows.values()), failures)
    say(f"{outcome.answered} of {outcome.given} bad inputs answered as they should be")
    return outcome
