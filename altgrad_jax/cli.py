"""How every script reads its command line and how it ends.

The flags are those of ml_collections' config_flags: `--config FILE`, `--config=FILE:ARGUMENT` (the argument
goes to get_config), `--config.FIELD=VALUE` or `--config.FIELD VALUE`, `--config.FLAG` and `--noconfig.FLAG`
for a yes-or-no field, a tuple as `--config.tags=a,b` or by repeating the flag; else the last of two values
wins. The parsing is our own, for config_flags answers a typo with a traceback, wants `--config` before the
overrides, says nothing of `x=8` without its dashes or of a missing file, and makes one tag of `a,b`.

A mistake of the user (UserError) is one `error: ...` on stderr and exit code 2, a machine that failed (MachineError)
the same with exit code 1; any other exception is a defect and keeps its traceback (exit code 1). No jax here: help
comes at once, and a script may set XLA's flags before jax starts.
"""

import argparse
import contextlib
import inspect
import os
import re
import sys
import textwrap
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ml_collections

from altgrad_jax import config as settings
from altgrad_jax.errors import UserError
from altgrad_jax.files import require_file

_YES = ("true", "t", "1", "yes")
_NO = ("false", "f", "0", "no")
_BASELINE = "configs/bf16_baseline.py"


@dataclass(frozen=True)
class Flag:
    """A flag of one script, `--name=VALUE`, which reaches its run function as the keyword `name`.

    `default` is text that `parse` accepts; a {field} in it is replaced by that setting's value. None: the
    keyword is None where the flag is absent. `parse` turns text into the value, or raises UserError naming
    the flag. `bare` is the text that the flag without a value stands for; None: it needs one.
    """

    name: str
    default: str | None
    meaning: str
    parse: Callable[[str], Any] = str
    bare: str | None = None


def yes_no(flag: str) -> Callable[[str], bool]:
    """A parser for a flag that is yes or no."""

    def parse(text: str) -> bool:
        if text not in ("yes", "no"):
            raise UserError(f"--{flag}={text} cannot be used: give yes or no")
        return text == "yes"

    return parse


def folder(flag: str) -> Callable[[str], str]:
    """A parser for a flag that names a folder, which need not exist yet."""

    def parse(text: str) -> str:
        if not settings.FIELDS["checkpoint_dir"].rule.accepts(text):
            raise UserError(f"--{flag}={text!r} cannot be used: give the path of a local folder")
        try:
            is_file = Path(text).exists() and not Path(text).is_dir()
        except OSError as error:
            raise UserError(f"--{flag}={text} cannot be used ({error.strerror}): give the path of a folder") from None
        if is_file:
            raise UserError(f"--{flag}={text} is a file: give a folder")
        return os.path.expanduser(text)

    return parse


def output_file(flag: str) -> Callable[[str], str]:
    """A parser for a flag that names a file to write in the end: what cannot be written is refused at the beginning."""

    def parse(text: str) -> str:
        where = os.path.dirname(text) or "."
        if not text or os.path.isdir(text) or not os.path.isdir(where):
            raise UserError(f"--{flag}={text} cannot be used: give the name of a file in a folder that exists")
        if not os.access(text if os.path.exists(text) else where, os.W_OK):
            raise UserError(f"--{flag}={text} cannot be written: give a file in a folder that you may write to")
        return text

    return parse


def resume_choice(text: str) -> str | int:
    """The value of --resume: "auto", "never", or the step of a checkpoint."""
    if text in ("auto", "never"):
        return text
    if re.fullmatch("[0-9]{1,10}", text) and int(text) <= settings.INT32_MAX:
        return int(text)
    raise UserError(
        f"--resume={text} cannot be used: give auto (go on from the newest checkpoint, if there is one), "
        "never (start anew), or the step of a checkpoint such as 1000"
    )


TRAIN_FLAGS = (
    Flag(
        "data_dir", "data/{tokenizer}", "folder of the token files (train.bin, val.bin, meta.json)", folder("data_dir")
    ),
    Flag("workdir", None, "folder of this run, in place of the config's checkpoint_dir", folder("workdir")),
    Flag(
        "resume",
        "auto",
        "auto = go on from the newest checkpoint that restores, if there is one; never = start anew, in an "
        "empty folder; a number = go on from that step's checkpoint",
        resume_choice,
    ),
)


DRY_RUN = Flag(
    "dry_run",
    "no",
    "yes, or the flag alone = only say what would be trained, in which memory and time",
    yes_no("dry_run"),
    bare="yes",
)


def number(flag: str, low: int) -> Callable[[str], int]:
    """A parser for a flag that is a whole number from `low`."""

    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,6}", text) or int(text) < low:
            raise UserError(f"--{flag}={text} cannot be used: give a whole number from {low}")
        return int(text)

    return parse


def _distributed_choice(text: str) -> str:
    if text not in ("off", "auto"):
        raise UserError(
            f"--distributed={text} cannot be used: give auto (several processes, as the SLURM, Open MPI or "
            "Kubernetes job around them says) or off"
        )
    return text


# How several processes that train one run find each other.
PROCESS_FLAGS = (
    Flag(
        "distributed",
        "off",
        "auto = one of the processes of the SLURM, Open MPI or Kubernetes job around it",
        _distributed_choice,
    ),
    Flag("coordinator", None, "HOST:PORT of process 0, with the next two for processes that are started by hand"),
    Flag("num_processes", None, "how many processes train the run together", number("num_processes", 1)),
    Flag("process_id", None, "which of them this is, from 0", number("process_id", 0)),
)


def main(
    run: Callable[..., int],
    *,
    usage: str,
    flags: Sequence[Flag] = TRAIN_FLAGS,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Reads the command line, calls `run(config, **{flag.name: value})` and exits with the code it returns.

    Args:
      run: takes the validated, locked ConfigDict and a keyword for each of `flags`.
      usage: what --help prints first; usually the script's docstring.
      flags: the script's own flags, beside --config, --config.FIELD and --help.
      argv: the arguments without the program's name; those of the process by default.
    """
    argv = sys.argv[1:] if argv is None else list(argv)

    def parse_and_run() -> int:
        if "--help" in argv or "-h" in argv:
            _print_to_reader(help_text(usage, flags))
            return 0
        config, values = parse(argv, flags)
        return run(config, **values)

    run_script(parse_and_run)


class ArgumentParser(argparse.ArgumentParser):
    """argparse for a script whose arguments are not flags of a config: abbreviations are refused, and a mistake is a
    UserError as everywhere else."""

    def __init__(self, description):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message):
        raise UserError(f"{message}; --help lists what to give")


def whole_number(text: str) -> int:
    """The type of an argument that is a whole number: ASCII digits alone, for int() takes more (1_0)."""
    if not re.fullmatch("-?[0-9]{1,19}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def some_text(text: str) -> str:
    """The type of an argument that must not be empty."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def run_script(function: Callable[[], int | None]) -> NoReturn:
    """Calls `function` and exits: with the code it returns (None is 0), a UserError's own (mostly 2), or 130."""
    try:
        code = function()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    if code and code > 128:
        # Threads may still be compiling, and Python would wait for them.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code or 0)


def _print_to_reader(text: str) -> None:
    """print, to a reader who may leave early, as the one of `--help | head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # Python would try once more at exit, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def help_text(usage: str, flags: Sequence[Flag]) -> str:
    """What --help prints: the usage, the script's flags, and every setting of a config."""
    lines = [usage.strip(), "", "Flags"]
    config_flag = Flag(
        "config", None, f"Python file whose get_config() returns the settings, such as {_BASELINE}; required"
    )
    for flag in (config_flag, *flags):
        default = "" if flag.default is None else f" [default {flag.default}]"
        lines += textwrap.wrap(
            flag.meaning + default,
            width=100,
            initial_indent=f"  --{flag.name} ".ljust(16),
            subsequent_indent=" " * 16,
            break_long_words=False,
            break_on_hyphens=False,
        )
    lines += [
        "",
        "Settings: the config file holds them, and --config.NAME=VALUE overrides one. The values here are",
        "the baseline's. Those marked * may be changed when a run is resumed.",
        "",
        settings.describe(),
    ]
    return "\n".join(lines)


def parse(argv: Sequence[str], flags: Sequence[Flag]) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
    """The validated, locked config and the values of `flags` by name that `argv` asks for, or UserError."""
    texts, overrides = _split(argv, flags)
    values = {flag.name: flag.parse(texts[flag.name]) for flag in flags if flag.name in texts}
    if "config" not in texts:
        raise UserError(f"no config is given: add --config {_BASELINE}, or the path of your own config file")
    config = load_config(texts["config"])
    with config.unlocked():
        for name, value in overrides.items():
            try:
                config[name] = value
            except (TypeError, ValueError):
                there = f"{settings.show(config[name])} of type {type(config[name]).__name__}"
                raise UserError(
                    f"--config.{name} cannot replace what {texts['config']} gave {name}, {there}: start from "
                    "default_config() there"
                ) from None
    settings.validate(config)
    config.lock()
    for flag in flags:
        if flag.name not in values:
            text = flag.default and flag.default.format_map(settings.to_dict(config))
            values[flag.name] = None if text is None else flag.parse(text)
    return config, values


def _split(argv: Sequence[str], flags: Sequence[Flag]) -> tuple[dict[str, str], dict[str, Any]]:
    """The text of --config and of each of `flags` that is given, and the parsed value of each override."""
    names = {"config", *(flag.name for flag in flags)}
    bare = {flag.name: flag.bare for flag in flags}
    texts: dict[str, str] = {}
    overrides: dict[str, Any] = {}
    waiting = list(argv)
    while waiting:
        argument = waiting.pop(0)
        if not re.match("--?[A-Za-z_]", argument):
            raise UserError(_stray(argument))
        name, equals, text = argument.lstrip("-").partition("=")
        given = text if equals else None
        prefix, dot, field_name = name.partition(".")
        if dot and prefix in ("config", "noconfig"):
            field = settings.FIELDS.get(field_name)
            if field is None:
                raise UserError(_unknown_override(field_name))
            value = _override(field, given, waiting, negated=prefix == "noconfig")
            if field.kind is tuple and field_name in overrides:
                value = overrides[field_name] + value
            overrides[field_name] = value
        elif name in names:
            if given is None and bare.get(name) is not None and (not waiting or waiting[0] not in ("yes", "no")):
                given = bare[name]
            texts[name] = _value_of(f"--{name}", given, waiting)
        else:
            raise UserError(_unknown_flag(name, names))
    return texts, overrides


def _override(field: settings.Field, given: str | None, waiting: list[str], negated: bool) -> Any:
    """The value of --config.FIELD (--noconfig.FIELD if `negated`), from `given` or from what follows it."""
    if negated:
        if field.kind is not bool or given is not None:
            raise UserError(
                f"--noconfig.{field.name} is only for a yes-or-no setting, without a value: "
                f"write --config.{field.name}=VALUE"
            )
        return False
    if field.kind is bool and given is None:
        # config_flags would take the flag as True and drop a False that follows.
        follows = waiting and waiting[0].lower() in _YES + _NO
        return parse_value(field, waiting.pop(0)) if follows else True
    return parse_value(field, _value_of(f"--config.{field.name}", given, waiting))


def _value_of(flag: str, given: str | None, waiting: list[str]) -> str:
    if given is not None:
        return given
    if not waiting or re.match("--?[A-Za-z_]", waiting[0]):
        raise UserError(f"{flag} needs a value: write {flag}=VALUE")
    return waiting.pop(0)


def parse_value(field: settings.Field, text: str) -> Any:
    """The value that `text` writes for `field`, of its type and in its range; UserError if there is none."""
    try:
        value = _READERS[field.kind](text)
        if field.rule.accepts(value):
            return value
    except ValueError:
        pass
    shown = text if text.isprintable() and len(text) <= 80 else settings.show(text)
    raise UserError(f"--config.{settings.cannot_use(field, shown)}")


def _read_bool(text: str) -> bool:
    if text.lower() in _YES + _NO:
        return text.lower() in _YES
    raise ValueError(text)


def _read_tuple(text: str) -> tuple[str, ...]:
    inside = text.strip()
    if inside[:1] + inside[-1:] in ("()", "[]"):
        inside = inside[1:-1].strip().removesuffix(",")
    return tuple(item.strip().strip("'\"") for item in inside.split(",")) if inside else ()


def _ascii(text: str) -> str:
    """`text`, unless it holds digits that Python reads and a reader may not, such as \u0663."""
    if not text.isascii():
        raise ValueError(text)
    return text


_READERS: Mapping[type, Callable[[str], Any]] = {
    bool: _read_bool,
    int: lambda text: int(_ascii(text)),
    float: lambda text: float(_ascii(text)),
    str: str,
    tuple: _read_tuple,
}


def _stray(argument: str) -> str:
    name, equals, value = argument.removeprefix("config.").partition("=")
    if argument.endswith(".py"):
        return f"unexpected argument {argument!r}: write --config {argument}"
    if equals and name in settings.FIELDS:
        return f"unexpected argument {argument!r}: a setting needs its dashes, write --config.{name}={value}"
    return f"unexpected argument {argument!r}: write flags only, such as --config {_BASELINE} or --config.seed=1"


def _unknown_override(name: str) -> str:
    guess = settings.nearest_field(name)
    hint = f"did you mean --config.{guess}?" if guess else "--help lists the settings"
    return f"there is no setting --config.{name}; {hint}"


def _unknown_flag(name: str, names: set[str]) -> str:
    plain = name.replace("-", "_")
    guess = settings.nearest(plain.partition(".")[0], names | {"help"})
    if "." in name and guess == "config":
        guess = f"config.{settings.nearest_field(name) or 'NAME'}"
    elif plain in settings.FIELDS or guess is None and settings.nearest_field(plain):
        guess = f"config.{settings.nearest_field(plain)}"
    hint = f"did you mean --{guess}?" if guess else "--help lists the flags"
    return f"there is no flag --{name}; {hint}"


def load_config(spec: str) -> ml_collections.ConfigDict:
    """What get_config() of a config file returns, not validated yet.

    Args:
      spec: `PATH` or `PATH:ARGUMENT`; get_config is called with the argument, a string, where there is one.

    Raises:
      UserError: the file is missing, fails, has no get_config, or returns something else than a ConfigDict.
    """
    path, colon, argument = spec.partition(":")
    if not path or os.path.isdir(path):
        raise UserError(f"--config={spec} is not a file: give a config file, such as --config {_BASELINE}")
    if not os.path.exists(path):
        folders = (os.path.dirname(path), "configs")
        files = [str(file) for place in folders if os.path.isdir(place) for file in sorted(Path(place).glob("*.py"))]
        guess = settings.nearest(path, files)
        hint = f"did you mean {guess}?" if guess else f"give one, such as the baseline {_BASELINE}"
        raise UserError(f"--config={path} does not exist in {Path.cwd()}; {hint}")
    require_file(path, f"give a config file, such as --config {_BASELINE}")

    # Compiled from the source each time: Python's cache goes by the second and the size, and would miss
    # `seed = 2` written over `seed = 1`.
    module = types.ModuleType("altgrad_jax_config_file")
    module.__file__ = path
    sys.modules[module.__name__] = module
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError(f"{path} has no function get_config(), so it is no config file; see {_BASELINE} for one")
        arguments = (argument,) if colon else ()
        _check_takes(get_config, arguments, path)
        config = get_config(*arguments)
        sys.modules[module.__name__] = module  # it may have loaded another one meanwhile
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(_failure_of(path, error)) from error
    if not isinstance(config, ml_collections.ConfigDict) or isinstance(config, ml_collections.FrozenConfigDict):
        raise UserError(
            f"get_config() of {path} returned a {type(config).__name__}; it must return the ConfigDict of "
            "altgrad_jax.config.default_config(), changed as you like"
        )
    return config


def sweep_of(config: ml_collections.ConfigDict) -> list[dict[str, Any]]:
    """What get_sweep(config) of the config file that was loaded last returns: the points of a sweep."""
    module = sys.modules["altgrad_jax_config_file"]
    get_sweep = getattr(module, "get_sweep", None)
    if not callable(get_sweep):
        raise UserError(
            f"{module.__file__} has no function get_sweep(config), so it names no members: add one, or "
            "give --axes, such as --axes='learning_rate=1e-3,2e-3;seed=0,1'"
        )
    try:
        points = get_sweep(config)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(_failure_of(module.__file__, error)) from error
    if not isinstance(points, list) or not all(isinstance(point, Mapping) for point in points):
        raise UserError(f"get_sweep() of {module.__file__} must return a list of {{setting: value}}")
    return points


def _check_takes(get_config: Callable[..., Any], arguments: tuple[str, ...], path: str) -> None:
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        if arguments:
            raise UserError(
                f"get_config() of {path} takes no argument, but --config gave it {arguments[0]!r}: "
                f"write --config {path}"
            ) from None
        raise UserError(f"get_config() of {path} needs an argument: write --config {path}:ARGUMENT") from None


def _failure_of(path: str, error: BaseException) -> str:
    """One sentence: where in the config file, and what."""
    if isinstance(error, SyntaxError):
        line, what = error.lineno, error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == path), None)
        try:
            what = str(error).strip().partition("\n")[0]
        except Exception:  # its own fault, in an exception of the config file's
            what = ""
    unknown = re.search('Key "([^"]*)" does not exist', what)
    # ml_collections' words.
    mistyped = re.match(
        r"Could not override field '(\w+)' \(reference\)\. (.*) is of original type <class '(.*?)'>", what
    )
    if unknown:
        what = settings.unknown_field(unknown[1])
    elif mistyped and mistyped[1] in settings.FIELDS:
        what = settings.cannot_use(settings.FIELDS[mistyped[1]], f"{settings.show(mistyped[2])} ({mistyped[3]})")
    else:
        what = f"{type(error).__name__}: {what}" if what else type(error).__name__
        what = what if len(what) <= 200 else what[:200] + "..."
    where = f"line {line} of {path}" if line else path
    return f"{where} fails: {what}"
