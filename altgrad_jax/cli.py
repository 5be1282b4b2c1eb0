"""How every script reads its command line, and how it ends: absl flags, and ml_collections' config flags.

A script defines its flags on an `absl.flags.FlagValues` of its own and calls `main`. With `config=True` it also takes
`--config=FILE.py` or `--config=FILE.py:ARGUMENT`, and `--config.SETTING=VALUE` as config_flags reads it. Two things are
added: the order of flags is free, `--config.tags=a,b` is two tags, and `--config=NAME` finds NAME.py in ./configs or
among the configs of this package. The config file is loaded here, because config_flags makes a ValueError with a
traceback for text of every mistake in it.

A mistake is one `error: ...` on stderr and exit code 2, before jax starts. An exception in the user's own config file
keeps its traceback. No jax here, so help comes at once.
"""

import contextlib
import copy
import inspect
import io
import os
import re
import signal
import sys
import traceback
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_collections
from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from altgrad_jax import config as settings
from altgrad_jax.data.tokenizer import tokenizer_name
from altgrad_jax.errors import UserError
from altgrad_jax.files import require_file, shipped

_BASELINE = "configs/bf16_baseline.py"
_MODULE = "altgrad_jax_config_file"
# The console command that was given; None where a script was started by its path.
command: str | None = None


class Parser(flags.ArgumentParser):
    """A parser for `flags.DEFINE`, made of a function that raises ValueError and of words that complete "give ...".

    Empty text is never right.
    """

    def __init__(self, parse: Callable[[str], Any], words: str):
        self._function, self.syntactic_help = parse, words

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):
            return argument  # a default
        if not argument:
            raise ValueError
        try:
            return self._function(argument)
        except OSError as error:  # a name that is too long, say
            raise ValueError from error


def _folder(text: str) -> str:
    path = os.path.expanduser(text)
    if not settings.FIELDS["checkpoint_dir"].accepts(text) or (Path(path).exists() and not Path(path).is_dir()):
        raise ValueError
    return path


def _output_file(text: str) -> str:
    where = os.path.dirname(text) or "."
    if os.path.isdir(text) or not os.access(text if os.path.exists(text) else where, os.W_OK):
        raise ValueError
    return text


def _whole_numbers(text: str) -> list[int]:
    if not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", text) or "0" in text.split(","):
        raise ValueError
    return [int(part) for part in text.split(",")]


FOLDER = Parser(_folder, "the path of a local folder; it need not exist, and no file may have its name")
OUTPUT_FILE = Parser(_output_file, "the name of a file in a folder that exists and that you may write to")
WHOLE_NUMBERS = Parser(_whole_numbers, "whole numbers from 1 joined by commas, such as 1,4,16")


class _Items(tuple_parser.TupleParser):
    """Items joined by commas, in brackets or not. Text without any is one empty item, which `overridden` removes."""

    def parse(self, argument: Any) -> tuple[str, ...]:
        if not isinstance(argument, str):
            return super().parse(argument)
        text = argument.strip()
        if text[:1] + text[-1:] in ("()", "[]"):
            text = text[1:-1].strip().removesuffix(",")
        items = tuple(item.strip().strip("'\"") for item in text.split(","))
        if len(items) > 1 and "" in items:
            raise ValueError("an item is empty")
        return items


# ---------------------------------------------------------------------------------------------------- a script's main


def new_flags(*, device: bool = False, data_dir: bool = False) -> flags.FlagValues:
    """The flags of a script, with those that several share: --device of all that compute, --data_dir."""
    own = flags.FlagValues()
    if device:
        meaning = "where to compute; auto = what JAX_PLATFORMS says, else a GPU if there is one"
        flags.DEFINE_enum("device", "auto", ("auto", "cpu", "gpu"), meaning, flag_values=own)
    if data_dir:
        flags.DEFINE(FOLDER, "data_dir", None, "folder of the token files (default: data/TOKENIZER)", flag_values=own)
    return own


def main(
    run: Callable[..., int | None],
    own: flags.FlagValues,
    *,
    usage: str | None,
    config: bool = False,
    arguments: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Reads the command line, calls `run` and exits with the code it returns (None is 0).

    Args:
      run: takes a keyword for each flag and argument; with `config` the validated, locked ConfigDict before them.
      own: the script's flags.
      usage: what --help prints first; usually the script's docstring, which python -OO takes away.
      config: whether the script is about a config; it then needs --config.
      arguments: names of the arguments without dashes; a last one that ends in "..." takes one or more.
      argv: the words behind the program's name; those of the process by default.
    """
    words = sys.argv[1:] if argv is None else list(argv)

    def parse_and_run() -> int | None:
        if {"--help", "-h", "-help"} & set(words):
            print(help_text(_as_command(usage or ""), own, config))
            return 0
        parsed, values = parse(words, own, config=config, arguments=arguments)
        return run(parsed, **values) if config else run(**values)

    run_script(parse_and_run)


def run_script(function: Callable[[], int | None]) -> NoReturn:
    """Calls `function` and exits with its code. The one place where exceptions become exit codes and sentences."""
    _open_standard_streams()
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)  # so that half-made files are removed; a training has its own way
    try:
        code = function() or 0
        _flush_output()
        if code > 128:  # a training was interrupted; threads may still be compiling, and Python would wait for them
            os._exit(code)
    except UserError as error:
        code = _say(str(error), error.exit_code)
    except (KeyboardInterrupt, _Terminated) as error:
        print("interrupted", file=sys.stderr)
        code = 130 if isinstance(error, KeyboardInterrupt) else 143
    except BrokenPipeError:  # the reader of `| head` left; Python would write once more at exit, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except OSError as error:
        what = f"{error.filename} cannot be used ({error.strerror})" if error.filename else str(error)
        code = _say(f"{what}: put that right, then give the same command again", 1)
    except RuntimeError as error:
        if not re.match("Unable to initialize backend|Unknown backend", str(error)):
            raise
        code = _say(f"{' '.join(str(error).split())}: give --device=cpu, or another JAX_PLATFORMS", 2)
    except ValueError as error:
        if not _is_from_options_of_jax(error):
            raise
        code = _say(f"{error}: give that variable another value, or unset it", 2)
    sys.exit(code)


def _open_standard_streams() -> None:
    """Gives the process the three streams where it was started without (`>&-`), or the next file that is opened would
    take their place; what the terminal's encoding lacks is written as escapes."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flush_output() -> None:
    """Writes what is left of the output. The work is done: a reader who left, or a full disk, changes no exit code."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes once more at exit


def _is_from_options_of_jax(error: BaseException) -> bool:
    """Whether jax refused a variable of the environment, which it does as it is imported."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return "jax" in str(error).lower() and frames[-1][0].f_globals.get("__name__") == "jax._src.config"


class _Terminated(BaseException):
    """SIGTERM, where Python would end without leaving its contexts."""


def _terminate(number: int, frame: object) -> None:
    raise _Terminated


def _say(sentence: str, code: int) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return code


def _as_command(usage: str) -> str:
    """The usage of a script with the console command in place of its path, where it was started by that."""
    if command is None:
        return usage
    script = command.removeprefix("altgrad-").replace("-", "_")
    return re.sub(r"configs/(\w+)\.py", r"\1", usage.replace(f"python scripts/{script}.py", command))


def help_text(usage: str, own: flags.FlagValues, config: bool) -> str:
    """What --help prints: the usage, the script's flags and, with `config`, every setting."""
    lines = [usage.strip(), "", "Flags"]
    if config:
        lines += settings.entry(
            "--config=FILE.py or NAME", f"its get_config() returns the settings, such as {_baseline()}"
        )
    for name in _names(own):
        flag = own[name]
        default = "" if flag.value is None or flag.boolean else f" [default {_as_text(flag.value)}]"
        lines += settings.entry(f"--{'[no]' if flag.boolean else ''}{name}", f"{flag.help}{default}")
    if config:
        lines += [
            "",
            "Settings: the config file holds them, and --config.NAME=VALUE overrides one. The values here are",
            "the baseline's. Those marked * may be changed when a run is resumed.",
            "",
            settings.describe(),
        ]
    return "\n".join(lines)


def _baseline() -> str:
    """The baseline's config as --config takes it here: by path in a checkout, else by name."""
    return _BASELINE if os.path.exists(_BASELINE) else Path(_BASELINE).stem


def _names(own: flags.FlagValues) -> list[str]:
    return [name for name in own if own[name].name == name]  # without short names


def _as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# ------------------------------------------------------------------------------------------------------------- parsing


def parse(
    argv: Sequence[str], own: flags.FlagValues, *, config: bool = True, arguments: Sequence[str] = ()
) -> tuple[ml_collections.ConfigDict | None, dict[str, Any]]:
    """(The validated, locked config or None, {name: value} of the script's flags and arguments), or UserError.

    Settings that nobody gave are fitted to those that were given (`config.fitted`), and a config file's derive(config)
    is called again, so that names it derives follow the flags; what changed is printed to stderr.
    """
    values = copy.deepcopy(own)
    values.set_gnu_getopt(True)
    if config:
        flags.DEFINE_string("config", None, "", flag_values=values)
    with _sentences(values):
        # Here unknown flags are left for config_flags, in their order.
        rest = values(["", *argv], known_only=config)[1:]
    result = None
    if config:
        spec = values["config"].value
        if spec is None:
            _refuse_arguments([word for word in rest if not word.startswith("-")])
            raise UserError(f"no config is given: add --config={_baseline()}, or the path of your own config file")
        result, given, rest = overridden(load_config(spec), rest, known=list(values))
        result = _finished(result, given)
    found = {name: values[name].value for name in _names(own)}
    for name, value in found.items():
        if value != value:  # absl's limits let NaN pass
            raise UserError(f"--{name}=nan cannot be used: give {_words(values[name].parser)}")
    if result is not None and "data_dir" in found:
        found["data_dir"] = found["data_dir"] or f"data/{tokenizer_name(str(result.tokenizer))}"
    return result, found | _arguments(rest, arguments)


def overridden(
    config: ml_collections.ConfigDict, words: Sequence[str], known: Collection[str] = ()
) -> tuple[ml_collections.ConfigDict, frozenset[str], list[str]]:
    """(`config` with the overrides among `words`, their names, the words without dashes); UserError for other flags.

    Args:
      config: changed in place.
      known: names of flags that there are beside the settings, for the hint at a wrong one.
    """
    for word in words:
        named = re.match(r"--?(?:no)?config\.([^=]*)", word)
        if named and named[1] not in settings.FIELDS:
            guess = settings.nearest_field(named[1])
            hint = f"did you mean --config.{guess}?" if guess else "--help lists the settings"
            raise UserError(f"there is no setting --config.{named[1]}; {hint}")
    if set(settings.values_of(config)) != set(settings.FIELDS):
        settings.validate(config)
    config_flags.register_flag_parser_for_type(tuple, _Items())
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    argv = ["", *words]
    with _sentences([*known, "help"]):
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        rest = values(argv)[1:]
    flag: Any = values["config"]
    changed = flag.override_values
    for name, value in changed.items():
        if isinstance(value, tuple) and "" in value:  # an empty override removes those before it
            config[name] = value[len(value) - value[::-1].index("") :]
    return config, frozenset(changed), rest


def _finished(config: ml_collections.ConfigDict, given: frozenset[str]) -> ml_collections.ConfigDict:
    """The config as it is run: settings that nobody gave fitted, names derived anew, validated and locked."""
    config, said = settings.fitted(config, given)
    settings.validate(config)
    derive = getattr(sys.modules[_MODULE], "derive", None)
    if derive is not None:
        derive(_Kept(config, given))
        settings.validate(config)
    for sentence in said:
        print(f"note: {sentence}", file=sys.stderr)
    config.lock()
    return config


class _Kept:
    """A config whose given settings keep their values, for derive(config)."""

    def __init__(self, config: ml_collections.ConfigDict, given: frozenset[str]):
        self.__dict__.update(_config=config, _given=given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    __getitem__ = __getattr__

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._given:
            setattr(self._config, name, value)


def parse_value(field: settings.Field, text: str) -> Any:
    """The value that `text` writes for `field`, as --config.NAME=`text` reads it; UserError if there is none."""
    config, _, _ = overridden(settings.default_config(), [f"--config.{field.name}={text}"])
    if problem := settings.problem(field, config[field.name]):
        raise UserError(f"--config.{problem}")
    return config[field.name]


@contextlib.contextmanager
def _sentences(known: Any) -> Iterator[None]:
    """A context in which what absl says of a mistake becomes one sentence. known: FlagValues, or names of flags."""
    try:
        yield
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown_flag(error.flagname, list(known))) from None
    except flags.IllegalFlagValueError as error:
        # absl's text is "flag --NAME=TEXT: WHY", and its context the exception that says why.
        name, _, text = str(error).removeprefix("flag --").removesuffix(f": {error.__context__}").partition("=")
        shown = text if text.isprintable() and len(text) <= 80 else settings.show(text)
        field = settings.FIELDS.get(name.removeprefix("config."))
        if field is not None and name.startswith("config."):
            raise UserError(f"--config.{settings.cannot_use(field, shown)}") from None
        raise UserError(f"--{name}={shown} cannot be used: give {_words(known[name].parser)}") from None
    except (flags.Error, ValueError) as error:  # a flag without its value, a flagfile that is not there
        text = str(error).removeprefix("Missing value for flag ")
        if text != str(error):
            raise UserError(f"{text} needs a value: write {text}=VALUE") from None
        raise UserError(f"{' '.join(text.removeprefix('ERROR:: ').split())}: --help lists what to give") from None


def _words(parser: Any) -> str:
    if hasattr(parser, "enum_values"):
        return f"one of {', '.join(parser.enum_values)}"
    return parser.syntactic_help or "true or false"


def _unknown_flag(name: str, known: list[str]) -> str:
    plain = name.replace("-", "_").removeprefix("noconfig.")
    field = settings.nearest_field(plain) if "config" in known else None
    guess = (
        f"config.{field}" if field and "." in plain else settings.nearest(plain, known) or field and f"config.{field}"
    )
    return f"there is no flag --{name}; {f'did you mean --{guess}?' if guess else '--help lists the flags'}"


def _arguments(words: list[str], names: Sequence[str]) -> dict[str, Any]:
    """{name: word}; the rest as a list for a last name that ends in "..."."""
    many = bool(names) and names[-1].endswith("...")
    if len(words) < len(names):
        raise UserError(f"{names[len(words)].removesuffix('...')} is missing: --help lists what to give")
    if not many:
        _refuse_arguments(words[len(names) :])
        return dict(zip(names, words))
    last = len(names) - 1
    return dict(zip(names[:last], words)) | {names[last].removesuffix("..."): words[last:]}


def _refuse_arguments(words: list[str]) -> None:
    if not words:
        return
    word = words[0]
    name, equals, value = word.removeprefix("config.").partition("=")
    if word.endswith(".py"):
        fix = f"write --config={word}"
    elif equals and name in settings.FIELDS:
        fix = f"a setting needs its dashes, write --config.{name}={value}"
    else:
        fix = "--help lists what to give"
    raise UserError(f"unexpected argument {word!r}: {fix}")


# --------------------------------------------------------------------------------------------------------- config files


def load_config(spec: str) -> ml_collections.ConfigDict:
    """What get_config() of a config file returns, neither fitted nor validated.

    Args:
      spec: `PATH` or `PATH:ARGUMENT`; get_config is called with the argument, a string, where there is one. A name
        such as `fp8` is the file of that name in ./configs, else that of this package.

    Raises:
      UserError: there is no such file, it has no get_config, or that takes or returns something else.
    """
    name, colon, argument = spec.partition(":")
    path = _config_file(name)
    if not os.path.exists(path):
        folders = (os.path.dirname(path), "configs")
        files = [str(file) for place in folders if os.path.isdir(place) for file in sorted(Path(place).glob("*.py"))]
        names = [file.stem for file in shipped("configs").glob("*.py")]
        guess = settings.nearest(path, files) or settings.nearest(path, names)
        hint = f"did you mean {guess}?" if guess else f"give one, such as the baseline {_baseline()}"
        raise UserError(f"--config={path} does not exist in {Path.cwd()}; {hint}")
    require_file(path, f"give a config file, such as --config={_baseline()}")
    # Compiled from the source each time: Python's cache goes by the second and the size of a file.
    module = types.ModuleType(_MODULE)
    module.__file__ = path
    sys.modules[_MODULE] = module
    exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"{path} has no function get_config(), so it is no config file; see {_baseline()} for one")
    try:
        inspect.signature(get_config).bind(*[argument] if colon else [])
    except TypeError:
        wants = f"takes no argument, and --config gives it {argument!r}: write --config={path}"
        wants = wants if colon else f"needs an argument: write --config={path}:ARGUMENT"
        raise UserError(f"get_config() of {path} {wants}") from None
    config = get_config(*[argument] if colon else [])
    sys.modules[_MODULE] = module  # it may have loaded another one meanwhile
    if not isinstance(config, ml_collections.ConfigDict) or isinstance(config, ml_collections.FrozenConfigDict):
        raise UserError(
            f"get_config() of {path} returned a {type(config).__name__}; it must return the ConfigDict of "
            "altgrad_jax.config.default_config(), changed as you like"
        )
    return config


def _config_file(name: str) -> str:
    """The path of the config that --config names."""
    if re.fullmatch(r"\w+", name) and not os.path.isfile(name):
        for folder in (Path("configs"), shipped("configs")):
            if os.path.isfile(file := folder / f"{name}.py"):  # false for a name too long, where pathlib raises
                return str(file)
    return name


def sweep_of(config: ml_collections.ConfigDict) -> list[dict[str, Any]]:
    """What get_sweep(config) of the config file that was loaded last returns: the points of a sweep."""
    module = sys.modules[_MODULE]
    get_sweep = getattr(module, "get_sweep", None)
    if not callable(get_sweep):
        raise UserError(
            f"{module.__file__} has no function get_sweep(config), so it names no members: add one, or "
            "give --axes, such as --axes='learning_rate=1e-3,2e-3;seed=0,1'"
        )
    points = get_sweep(config)
    if not isinstance(points, list) or not all(isinstance(point, Mapping) for point in points):
        raise UserError(f"get_sweep() of {module.__file__} must return a list of {{setting: value}}")
    return points
