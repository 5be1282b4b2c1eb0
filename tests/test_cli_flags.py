"""The command line of every script: what it accepts, as config_flags would, and how it refuses the rest."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from altgrad_jax import cli
from altgrad_jax.config import FIELDS, default_config
from altgrad_jax.errors import UserError
from altgrad_jax.run.device import use_device
from altgrad_jax.run.processes import check_flags

ROOT = Path(__file__).parents[1]
BASELINE = "configs/bf16_baseline.py"
CONFIG = f"--config={BASELINE}"
GOOD = "from altgrad_jax.config import default_config\ndef get_config():\n    config = default_config()\n"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def some_flags():
    own = cli.new_flags(device=True, data_dir=True)
    flags.DEFINE(cli.FOLDER, "workdir", None, "a folder", flag_values=own)
    train = runpy.run_path(str(ROOT / "scripts" / "train.py"))
    flags.DEFINE(cli.Parser(train["resume_choice"], train["RESUME"]), "resume", "auto", "how to go on", flag_values=own)
    flags.DEFINE(cli.WHOLE_NUMBERS, "widths", None, "numbers", flag_values=own)
    flags.DEFINE_integer("rounds", 9, "how often", 1, 1000, short_name="r", flag_values=own)
    flags.DEFINE_bool("quick", False, "less of all", flag_values=own)
    return own


def parse(*argv):
    return cli.parse(argv, some_flags())


def refusal(*argv) -> str:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def config_file(folder: Path, body: str) -> str:
    path = folder / "mine.py"
    path.write_text(body)
    return str(path)


# --- what is accepted -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--config.batch_size=8"],
        ["--config.batch_size", "8"],
        ["-config.batch_size=8"],
        ["--config.batch_size=8", "--config.batch_size=6"],
        ["--config.learning_rate=1e-3", "--config.dropout=0", "--config.grad_clip", "2"],
        ["--config.deterministic"],
        ["--config.deterministic=true"],
        ["--config.deterministic", "--noconfig.deterministic"],
        ["--config.tags=a", "--config.tags=b"],
        ["--config.tags=('a', 'b')"],
        ["--config.tags=('a',)"],
        ["--config.tags", "a-b"],
        ["--config.run_name=x=y", "--config.wandb_entity="],
        ["--config.wandb_entity=x", "--config.wandb_entity="],
        ["--config.checkpoint_dir", "runs/a b"],
        ["--config.use_fp8", "--config.formats=E4M3", "--config.formats=block_*:G=E5M2"],
    ],
)
def test_a_good_command_line_means_what_config_flags_takes_it_for(arguments):
    argv = ["train.py", *arguments]
    values = flags.FlagValues()
    # The dict, not the file: config_flags loads a file by a method that Python warns is to go.
    oracle = config_flags.DEFINE_config_dict("config", default_config(), flag_values=values, sys_argv=argv)
    values(argv)
    config = parse(CONFIG, *arguments)[0]
    derived = {"vocab_size", "run_name", "checkpoint_dir", "tags"}  # in what follows, unless they are given
    given = {word.lstrip("-").removeprefix("config.").split("=")[0] for word in arguments}
    for name in FIELDS:
        if name not in derived or name in given:
            assert config[name] == oracle.value[name], name


@pytest.mark.parametrize(
    "words, tags",
    [
        (["=a,b"], ("a", "b")),
        (["=a, b"], ("a", "b")),
        (["=[a,b]"], ("a", "b")),
        (["="], ()),
        (["=()"], ()),
        (["=a", "="], ()),
        (["=a", "=", "=b,c"], ("b", "c")),
    ],
)
def test_tags_are_split_at_commas_and_a_later_empty_one_wins(words, tags):
    assert parse(CONFIG, *(f"--config.tags{word}" for word in words))[0].tags == tags


def test_rules_are_split_at_commas():
    for text, formats in (
        ("E4M3,block_*:G=E5M2", ("E4M3", "block_*:G=E5M2")),
        ("block_[01]/*=E3M4, head:WA=E4M3", ("block_[01]/*=E3M4", "head:WA=E4M3")),
    ):
        assert parse("--config=configs/fp8.py:E6M1", f"--config.formats={text}")[0].formats == formats  # not added


def test_the_order_of_flags_is_free_and_a_flagfile_is_read(tmp_path):
    config, values = parse(
        "--config.n_layer=3", "--resume", "200", "--config.n_head=8", "--config", BASELINE, "--quick"
    )
    assert (config.n_layer, config.n_head, values["resume"], values["quick"]) == (3, 8, 200, True)
    (tmp_path / "flags").write_text(f"{CONFIG}\n--config.seed=3\n# a comment\n--rounds=4\n")
    config, values = parse("--config.seed=1", f"--flagfile={tmp_path / 'flags'}", "--config.n_layer=2", "--")
    assert (config.seed, config.n_layer, values["rounds"]) == (3, 2, 4)


def test_the_flags_of_a_script_and_their_defaults():
    none = dict(device="auto", workdir=None, resume="auto", widths=None, rounds=9, quick=False)
    assert parse(CONFIG)[1] == {"data_dir": "data/gpt2", **none}
    assert parse("--config=configs/smoke.py")[1] == {"data_dir": "data/bytes", **none}
    got = parse(CONFIG, "--workdir", "w", "--data_dir=~", "--resume=never", "--widths=1,4", "-r=2", "--noquick")[1]
    home = os.path.expanduser("~")
    assert got == none | dict(data_dir=home, workdir="w", resume="never", widths=[1, 4], rounds=2)


def test_flags_can_be_parsed_again():
    own = some_flags()
    assert cli.parse([CONFIG, "--rounds=3"], own)[1]["rounds"] == 3
    assert cli.parse([CONFIG], own)[1]["rounds"] == 9


def test_arguments_without_dashes():
    def values(words, *names):
        return cli.parse(words, cli.new_flags(), config=False, arguments=names)[1]

    assert values(["a", "b"], "source", "out") == {"source": "a", "out": "b"}
    assert values(["a", "--", "-b"], "runs...") == {"runs": ["a", "-b"]}
    for words, names, message in (
        (["a"], ("source", "out"), "out is missing: "),
        ([], ("runs...",), "runs is missing: "),
        (["a", "b"], ("run",), "unexpected argument 'b': "),
        (["a", "--st=1"], ("run",), "there is no flag --st; "),
    ):
        with pytest.raises(UserError, match=message):
            values(words, *names)


def test_a_config_file_may_take_an_argument_and_is_read_anew(tmp_path):
    named = GOOD.replace("get_config()", "get_config(name='none')") + "    config.run_name = name\n    return config\n"
    path = config_file(tmp_path, named)
    assert parse(f"--config={path}:E5M2:x")[0].run_name == "E5M2:x"
    assert parse(f"--config={path}")[0].run_name == "none"
    for seed in "12":  # equal in size and time: what Python's cache of compiled files cannot tell apart
        path = config_file(tmp_path, GOOD + f"    config.unlock(); config.seed = {seed}\n    return config\n")
        os.utime(path, (1, 1))
        config = parse(f"--config={path}")[0]
        assert config.seed == int(seed) and config.is_locked


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_can_be_set_by_a_flag(name):
    default = FIELDS[name].default
    text = ",".join(default) if isinstance(default, tuple) else str(default)
    config, given, _ = cli.overridden(default_config(), [f"--config.{name}={text}"])
    assert config[name] == default and type(config[name]) is type(default) and given == {name}


# --- what follows from flags ----------------------------------------------------------------------


def test_what_nobody_set_is_fitted_and_told(capsys):
    assert parse("--config=configs/smoke.py", "--config.max_steps=12")[0].warmup_steps == 1
    assert capsys.readouterr().err == (
        "note: warmup_steps=1 is used, because warmup_steps=20 does not fit into max_steps=12 with "
        "schedule='constant'\n"
    )
    assert "warmup_steps=20 is more than max_steps=12" in refusal(
        "--config=configs/smoke.py", "--config.max_steps=12", "--config.warmup_steps=20"
    )
    assert parse("--config=configs/smoke.py", "--config.tokenizer=gpt2")[0].vocab_size == 50257


@pytest.mark.parametrize(
    "words, run_name, checkpoint_dir, tags",
    [
        (["fp8.py:E4M3", "--config.formats=E5M2"], "e5m2", "checkpoints/e5m2", ("e5m2", "eurlex")),
        (["fp8.py:E4M3", "--noconfig.use_fp8"], "bf16", "checkpoints/bf16", ("bf16", "eurlex")),
        (["fp8.py:E4M3", "--config.run_name=mine"], "mine", "checkpoints/mine", ("e4m3", "eurlex")),
        (["fp8.py:E4M3,grid", "--config.checkpoint_dir=x"], "e4m3-grid", "x", ("e4m3", "eurlex", "grid")),
        (["fp8.py:E4M3", "--config.tags="], "e4m3", "checkpoints/e4m3", ()),
        (
            ["fp8.py:E4M3", "--config.formats=E4M3,block_*:G=E5M2"],
            "e4m3-block_-g-e5m2",
            "checkpoints/e4m3-block_-g-e5m2",
            ("e4m3-block_-g-e5m2", "eurlex"),
        ),
        (["bf16_baseline.py"], "bf16-baseline", "checkpoints/bf16_baseline", ("baseline", "bf16", "eurlex")),
        (
            ["bf16_baseline.py", "--config.compute_dtype=float32"],
            "float32-baseline",
            "checkpoints/float32_baseline",
            ("baseline", "float32", "eurlex"),
        ),
        (["small.py", "--config.run_name=a"], "a", "checkpoints/a", ("small", "bf16", "bytes")),
        (["mixed.py", "--config.formats=head=E4M3"], "mixed-e4m3", "checkpoints/mixed-e4m3", ("mixed", "eurlex")),
    ],
)
def test_names_that_a_config_derives_follow_the_flags(words, run_name, checkpoint_dir, tags):
    config = parse(f"--config=configs/{words[0]}", *words[1:])[0]
    assert (config.run_name, config.checkpoint_dir, config.tags) == (run_name, checkpoint_dir, tags)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config.n_layr=2"], ["there is no setting --config.n_layr", "did you mean --config.n_layer?"]),
        (["--config.lr=1"], ["--config.learning_rate"]),
        (["--config.model.n_layer=2"], ["did you mean --config.n_layer?"]),
        (["--config.zzz=2"], ["--help lists the settings"]),
        (["--workdr=x"], ["there is no flag --workdr; did you mean --workdir?"]),
        (["--confg.seed=3"], ["did you mean --config.seed?"]),
        (["--batch_size=8"], ["did you mean --config.batch_size?"]),
        (["--qqq"], ["there is no flag --qqq; --help"]),
        (["x=8"], ["unexpected argument 'x=8'"]),
        (["batch_size=8"], ["'batch_size=8'", "write --config.batch_size=8"]),
        (["config.batch_size=8"], ["write --config.batch_size=8"]),
        (["configs/smoke.py"], ["write --config=configs/smoke.py"]),
        (["--config.deterministic", "False"], ["unexpected argument 'False'"]),
        (["--config.n_layer"], ["--config.n_layer needs a value: write --config.n_layer=VALUE"]),
        (["--config.n_layer", "--resume=auto"], ["--config.n_layer needs a value"]),
        (["--resume"], ["--resume needs a value"]),
        (["--noconfig.n_layer"], ["--noconfig.n_layer", "did you mean --config.n_layer?"]),
        (["--noconfig.deterministic=true"], ["noconfig.deterministic=true does not take an argument"]),
        (["--config.n_layer=six"], ["--config.n_layer=six cannot be used: give a whole number from 1 to 1024"]),
        (["--config.n_layer=6.0"], ["--config.n_layer=6.0"]),
        (["--config.n_layer="], ["--config.n_layer= cannot"]),
        (["--config.max_steps=" + "9" * 5000], ["--config.max_steps='999"]),
        (["--config.seed", "-1"], ["seed=-1", "from 0"]),
        (["--config.learning_rate=fast"], ["--config.learning_rate=fast", "a number"]),
        (["--config.learning_rate=nan"], ["learning_rate=nan"]),
        (["--config.deterministic=maybe"], ["--config.deterministic=maybe", "True or False"]),
        (["--config.run_name=None"], ["run_name='None'"]),
        (["--config.run_name=a\nb"], ["run_name='a\\nb'"]),
        (["--config.tags=a,,b"], ["--config.tags=a,,b"]),
        (["--config.tags=a", "--config.tags=a"], ["tags=('a', 'a')"]),
        (["--config.schedule=linear"], ["schedule='linear'", "one of constant, cosine, wsd"]),
        (["--config.loggers=wandb,aim"], ["loggers=('wandb', 'aim')", "one of wandb, tensorboard"]),
        (["--config.use_fp8"], ["use_fp8=True needs to know the formats", "--config.formats=E4M3"]),
        (["--config.formats=E4M3", "--noconfig.use_fp8"], ["formats=('E4M3',) has no effect with use_fp8=False"]),
        (["--config.use_fp8", "--config.formats=float8_e4m3xx"], ["a rule 'float8_e4m3xx'", "give one of E4M3"]),
        (["--config.n_head=5"], ["n_embd=384", "n_head=5"]),
        (["--resume=maybe"], ["--resume=maybe cannot be used: give auto", "never", "1000"]),
        (["--resume=-1"], ["--resume=-1"]),
        (["--resume=2147483648"], ["--resume=2147483648"]),
        (["--data_dir="], ["--data_dir= cannot"]),
        (["--workdir=gs://bucket/x"], ["--workdir=gs://bucket/x", "local folder"]),
        (["--workdir=~no-such-user/x"], ["~no-such-user/x", "local folder"]),
        (["--workdir=pyproject.toml"], ["--workdir=pyproject.toml", "no file may have its name"]),
        (["--device=tpu"], ["--device=tpu cannot be used: give one of auto, cpu, gpu"]),
        (["--rounds=0"], ["--rounds=0 cannot be used: give an integer in the range [1, 1000]"]),
        (["--widths=1,x"], ["--widths=1,x", "joined by commas"]),
        (["--quick=yes"], ["--quick=yes cannot be used: give true or false"]),
        (["--flagfile=nowhere"], ["Unable to open flagfile", "nowhere"]),
    ],
)
def test_refused(arguments, words):
    message = refusal(CONFIG, *arguments)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "spec, words",
    [
        ("configs/smok.py", ["configs/smok.py does not exist", "did you mean configs/smoke.py?"]),
        ("smok", ["does not exist", "did you mean smoke?"]),
        ("configs", ["not a file", BASELINE]),
        ("", ["does not exist"]),
        ("a\0b.py", ["a\\x00b.py does not exist"]),
        ("/dev/zero", ["/dev/zero is a device, not a file"]),
        (f"{BASELINE}:E5M2", ["takes no argument", "'E5M2'"]),
        ("altgrad_jax/errors.py", ["no function get_config()", BASELINE]),
    ],
)
def test_refused_config_paths(spec, words):
    message = refusal(f"--config={spec}")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "body, words",
    [
        ("get_config = 3", ["no function get_config()"]),
        ("def get_config(): return {}", ["returned a dict", "ConfigDict"]),
        ("def get_config(): pass", ["returned a NoneType"]),
        ("def get_config(name): pass", ["needs an argument", ":ARGUMENT"]),
        (GOOD + "    with config.unlocked(): config[5] = 1\n    return config\n", ["whose name is no text"]),
        ("import ml_collections\nget_config = ml_collections.FrozenConfigDict", ["returned a FrozenConfigDict"]),
        ("import ml_collections\nget_config = ml_collections.ConfigDict", ["the setting n_layer is missing"]),
        (GOOD + "    config.dropout = float('nan')\n    return config\n", ["dropout=nan cannot be used"]),
        (GOOD + "    config.n_layer = True\n    return config\n", ["n_layer=True (bool)"]),
        ("from altgrad_jax.errors import UserError\nraise UserError('own words')", ["own words"]),
    ],
)
def test_refused_config_files(tmp_path, body, words):
    with pytest.raises(UserError) as caught:
        parse(f"--config={config_file(tmp_path, body)}")
    for word in words:
        assert word in str(caught.value)


def test_an_exception_of_the_users_own_file_stays_what_it_is(tmp_path):
    with pytest.raises(ZeroDivisionError):
        parse(f"--config={config_file(tmp_path, '1 / 0')}")
    with pytest.raises(AttributeError, match="Did you mean.*batch_size"):
        parse(f"--config={config_file(tmp_path, GOOD + '    config.batchsize = 8')}")


def test_no_config_names_the_baseline():
    assert f"--config={BASELINE}" in refusal()
    assert f"--config={BASELINE}" in refusal("--config.seed=1")


@pytest.mark.parametrize("text", ["", "{folder}", "{folder}/none/a.json", "/proc/none/a.json"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, text):
    own = cli.new_flags()
    flags.DEFINE(cli.OUTPUT_FILE, "json", None, "figures", flag_values=own)
    with pytest.raises(UserError, match="--json=.* cannot be used: give the name of a file in a folder that exists"):
        cli.parse([f"--json={text.format(folder=tmp_path)}"], own, config=False)
    assert cli.parse([f"--json={tmp_path}/a.json"], own, config=False)[1] == {"json": f"{tmp_path}/a.json"}


@pytest.mark.parametrize("port", ["0", "65536", "99999", "x", ""])
def test_a_coordinator_needs_a_port(port):
    with pytest.raises(UserError, match=f"--coordinator=node:{port} cannot be used"):
        check_flags("off", f"node:{port}", 2, 0)


# --- how a script ends ----------------------------------------------------------------------------


def ends(capsys, function, *arguments, **keywords):
    """(exit code, stdout, stderr) of a function that ends the process."""
    with pytest.raises(SystemExit) as caught:
        function(*arguments, **keywords)
    return caught.value.code, *capsys.readouterr()


def fails(error):
    raise error


def test_main_runs_with_the_config_and_exits_with_its_code(capsys):
    def run(config, *, resume, workdir, **others):
        print(config.seed, workdir, resume)
        return 3

    argv = [CONFIG, "--config.seed=7", "--workdir=w"]
    assert ends(capsys, cli.main, run, some_flags(), usage="", config=True, argv=argv) == (3, "7 w auto\n", "")
    code, out, err = ends(
        capsys, cli.main, pytest.fail, some_flags(), usage="", config=True, argv=[CONFIG, "--config.seed=x"]
    )
    assert (code, out) == (2, "")
    assert err.startswith("error: --config.seed=x cannot be used") and err.count("\n") == 1


@pytest.mark.parametrize("argv", [["--help"], ["-h"], [CONFIG, "--config.nonsense=1", "--help"]])
def test_help(capsys, argv):
    usage = "\nTrains.\n\n  By example.\n"
    code, out, err = ends(capsys, cli.main, pytest.fail, some_flags(), usage=usage, config=True, argv=argv)
    assert (code, err) == (0, "")
    assert out.startswith("Trains.\n\n  By example.\n") and max(map(len, out.split("\n"))) <= 100
    for name in ("config", "data_dir", "workdir", "resume", "rounds", "[no]quick"):
        assert f"  --{name}" in out
    assert "how often [default 9]" in out and "--r " not in out
    for name in FIELDS:
        assert f"\n  {name}=" in out


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UserError("no."), 2, "error: no.\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            OSError(28, "No space left on device", "/x/y"),
            1,
            "error: /x/y cannot be used (No space left on device): put",
        ),
        (ConnectionError("gone"), 1, "error: gone: put that right"),
        (
            RuntimeError("Unable to initialize backend 'tpu': no"),
            2,
            "error: Unable to initialize backend 'tpu': no: give",
        ),
    ],
)
def test_how_exceptions_end_a_script(capsys, error, code, said):
    got = ends(capsys, cli.run_script, lambda: fails(error))
    assert got[:2] == (code, "") and got[2].startswith(said) and got[2].count("\n") == 1


def test_codes_are_passed_on_and_a_defect_keeps_its_traceback(capsys):
    assert ends(capsys, cli.run_script, lambda: 5)[0] == 5
    assert ends(capsys, cli.run_script, lambda: None)[0] == 0
    for error in (ZeroDivisionError(), RuntimeError("other")):
        with pytest.raises(type(error)):
            cli.run_script(lambda: fails(error))


@pytest.mark.parametrize("asked, name", [("", "gpu"), ("cuda", "auto"), ("cpu", "gpu")])
def test_a_gpu_that_is_not_there_is_one_sentence(monkeypatch, asked, name):
    import jax

    monkeypatch.setattr("os.path.exists", lambda path: False)
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", asked)
        with pytest.raises(
            UserError, match="--device=gpu asks for" if name == "gpu" else "JAX_PLATFORMS=cuda asks for"
        ):
            use_device(name)
        use_device("cpu")
        assert jax.config.jax_platforms == "cpu"
    finally:
        jax.config.update("jax_platforms", before)


def test_as_a_process(tmp_path):
    """By path, from elsewhere, as scripts/train.py is run: sys.path[0] is the script's folder. jax must not start."""
    (tmp_path / "jax.py").write_text("raise ImportError('jax was imported')\n")
    script = tmp_path / "script.py"
    script.write_text(
        "from altgrad_jax import cli\n"
        "cli.main(lambda config, **flags: print(config.run_name) or 7, cli.new_flags(), usage='U', config=True)\n"
    )

    def process(*argv, **keywords):
        return subprocess.run(
            [sys.executable, str(script), *argv],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
            stderr=subprocess.PIPE,
            stdout=keywords.get("stdout", subprocess.PIPE),
        )

    done = process(f"--config={ROOT}/configs/smoke.py")
    assert (done.returncode, done.stdout, done.stderr) == (7, "smoke\n", "")
    done = process(CONFIG)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {CONFIG} does not exist") and done.stderr.count("\n") == 1
    done = process("--help")
    assert done.returncode == 0 and done.stdout.startswith("U\n") and done.stderr == ""

    read_end, write_end = os.pipe()
    os.close(read_end)
    try:  # as under `| head`, whose end closes the pipe
        assert process("--help", stdout=write_end).stderr == ""
    finally:
        os.close(write_end)


EVERY_SCRIPT = """
import contextlib, io, pathlib, runpy, sys
sys.path.insert(0, "scripts")
for path in sorted(pathlib.Path("scripts").glob("*.py")):
    for word in ("--help", "--no_such_flag"):
        sys.argv, said = [str(path), word], io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            print(path.name, word, end.code, said.getvalue().count("error: "))
"""


def test_help_and_mistakes_of_every_script_come_without_jax(tmp_path):
    (tmp_path / "jax.py").write_text("raise ImportError('jax was imported')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", EVERY_SCRIPT], text=True, capture_output=True, env=environment)
    names = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))
    assert done.stdout.splitlines() == [
        line for name in names for line in (f"{name} --help 0 0", f"{name} --no_such_flag 2 1")
    ], done.stderr


def test_an_error_can_be_printed_whatever_it_quotes():
    assert str(UserError("a\nb\x1b[31m\ud800 caf\u00e9")) == r"a\nb\x1b[31m\ud800 caf\u00e9".replace(
        r"\u00e9", "\u00e9"
    )
    assert str(UserError("2 settings:\n  - a\n  - b")) == "2 settings:\n  - a\n  - b"
