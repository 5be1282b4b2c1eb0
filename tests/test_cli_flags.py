"""The command line of every script: what it accepts, as config_flags would, and how it refuses the rest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags as absl_flags
from ml_collections import config_flags

from altgrad_jax import cli
from altgrad_jax.config import FIELDS, default_config
from altgrad_jax.errors import UserError
from altgrad_jax.run.processes import check_flags

ROOT = Path(__file__).parents[1]
BASELINE = "configs/bf16_baseline.py"
CONFIG = f"--config={BASELINE}"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def parse(*argv):
    return cli.parse(argv, cli.TRAIN_FLAGS)


def refusal(*argv) -> str:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def config_file(folder: Path, body: str, name: str = "mine.py") -> str:
    path = folder / name
    path.write_text(body)
    return str(path)


GOOD = "from altgrad_jax.config import default_config\ndef get_config():\n    config = default_config()\n"


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
        ["--config.deterministic=False"],
        ["--noconfig.deterministic"],
        ["--config.tags=a", "--config.tags=b"],
        ["--config.tags=('a', 'b')"],
        ["--config.tags=('a',)"],
        ["--config.tags=()"],
        ["--config.tags", "a-b"],
        ["--config.run_name=x=y", "--config.wandb_entity="],
        ["--config.checkpoint_dir", "runs/a b"],
        ["--config.use_fp8", "--config.formats=E4M3", "--config.formats=block_*:G=E5M2"],
        ["--config.use_fp8=true", "--config.formats=('E4M3', 'block_*/mlp_*:WA=E3M4')", "--config.range_clip=1"],
    ],
)
def test_a_good_command_line_means_what_config_flags_takes_it_for(arguments):
    argv = ["train.py", *arguments]
    values = absl_flags.FlagValues()
    # The dict, not the file: config_flags loads a file by a method that Python warns is to go.
    oracle = config_flags.DEFINE_config_dict("config", default_config(), flag_values=values, sys_argv=argv)
    values(argv)
    assert parse(CONFIG, *arguments)[0].to_dict() == oracle.value.to_dict()


@pytest.mark.parametrize(
    "text, tags",
    [
        ("a,b", ("a", "b")),
        ("a, b", ("a", "b")),
        ("[a,b]", ("a", "b")),
        ("a", ("a",)),
        ("", ()),
    ],
)
def test_tags_are_split_at_commas(text, tags):
    assert parse(CONFIG, f"--config.tags={text}")[0].tags == tags


@pytest.mark.parametrize(
    "text, formats",
    [
        ("E4M3", ("E4M3",)),
        ("E4M3,block_*:G=E5M2", ("E4M3", "block_*:G=E5M2")),
        ("block_[01]/*=E3M4, head:WA=E4M3", ("block_[01]/*=E3M4", "head:WA=E4M3")),
    ],
)
def test_rules_are_split_at_commas(text, formats):
    assert parse(CONFIG, "--config.use_fp8", f"--config.formats={text}")[0].formats == formats
    assert parse("--config=configs/fp8.py:E6M1", f"--config.formats={text}")[0].formats == formats  # not added to E6M1


def test_the_order_of_flags_is_free():
    config, values = parse("--config.n_layer=3", "--resume", "200", "--config.n_head=8", "--config", BASELINE)
    assert (config.n_layer, config.n_head, values["resume"]) == (3, 8, 200)


def test_a_false_after_a_space_is_false():
    assert parse(CONFIG, "--config.deterministic", "False")[0].deterministic is False
    assert parse("--config.deterministic", CONFIG)[0].deterministic is True


def test_the_config_that_comes_back_is_locked(tmp_path):
    assert parse(CONFIG, "--config.seed=1")[0].is_locked
    path = config_file(tmp_path, GOOD + "    config.unlock()\n    return config\n")
    assert parse(f"--config={path}", "--config.seed=1")[0].is_locked


def test_flags_of_the_training_script():
    assert parse(CONFIG)[1] == {"data_dir": "data/gpt2", "workdir": None, "resume": "auto"}
    assert parse("--config=configs/smoke.py")[1]["data_dir"] == "data/bytes"
    own = parse(CONFIG, "--data_dir=d", "--workdir", "w", "--resume=never")[1]
    assert own == {"data_dir": "d", "workdir": "w", "resume": "never"}


def test_a_config_file_may_take_an_argument(tmp_path):
    path = config_file(
        tmp_path,
        GOOD.replace("get_config()", "get_config(name='none')") + "    config.run_name = name\n    return config\n",
    )
    assert parse(f"--config={path}:E5M2:x")[0].run_name == "E5M2:x"
    assert parse(f"--config={path}")[0].run_name == "none"


def test_a_config_file_is_read_anew_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for seed in "12":  # equal in size and time: what Python's cache of compiled files cannot tell apart
        path = config_file(tmp_path, GOOD + f"    config.seed = {seed}\n    return config\n")
        os.utime(path, (1, 1))
        assert parse(f"--config={path}")[0].seed == int(seed)


def test_a_reference_in_a_config_file_follows_an_override(tmp_path):
    path = config_file(
        tmp_path,
        GOOD + "    with config.unlocked():\n"
        "        config.warmup_steps = config.get_ref('max_steps') // 10\n    return config\n",
    )
    assert parse(f"--config={path}", "--config.max_steps=500")[0].warmup_steps == 50


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config.batchsize=8"], ["no setting --config.batchsize", "did you mean --config.batch_size?"]),
        (["--config.lr=1"], ["--config.lr", "--config.learning_rate"]),
        (["--noconfig.determinstic"], ["--config.deterministic"]),
        (["--config.model.n_layer=3"], ["--config.model.n_layer", "--config.n_layer"]),
        (["--config.qqq=3"], ["--config.qqq", "--help"]),
        (["--config.=3"], ["no setting --config."]),
        (["--batch_size=8"], ["no flag --batch_size", "--config.batch_size"]),
        (["--lr=8"], ["no flag --lr", "--config.learning_rate"]),
        (["--confg.n_layer=3"], ["--config.n_layer"]),
        (["--data-dir=x"], ["no flag --data-dir", "--data_dir"]),
        (["--resum=auto"], ["--resume"]),
        (["--qqq"], ["no flag --qqq", "--help"]),
        (["x=8"], ["unexpected argument 'x=8'"]),
        (["batch_size=8"], ["'batch_size=8'", "write --config.batch_size=8"]),
        (["config.batch_size=8"], ["write --config.batch_size=8"]),
        (["configs/smoke.py"], ["write --config configs/smoke.py"]),
        (["--"], ["unexpected argument '--'"]),
        (["-5"], ["unexpected argument '-5'"]),
        (["--config.n_layer"], ["--config.n_layer needs a value"]),
        (["--config.n_layer", "--resume=auto"], ["--config.n_layer needs a value"]),
        (["--resume"], ["--resume needs a value"]),
        (["--noconfig.n_layer"], ["--noconfig.n_layer", "yes-or-no"]),
        (["--noconfig.deterministic=true"], ["--noconfig.deterministic"]),
        (["--config.n_layer=six"], ["--config.n_layer=six", "a whole number from 1 to 1024"]),
        (["--config.n_layer=6.0"], ["--config.n_layer=6.0"]),
        (["--config.n_layer="], ["--config.n_layer= cannot"]),
        (["--config.max_steps=2e3"], ["--config.max_steps=2e3", "whole number"]),
        (["--config.max_steps=" + "9" * 5000], ["--config.max_steps='999"]),
        (["--config.seed", "-1"], ["--config.seed=-1", "from 0"]),
        (["--config.learning_rate=fast"], ["--config.learning_rate=fast", "a number"]),
        (["--config.learning_rate=nan"], ["--config.learning_rate=nan"]),
        (["--config.grad_clip=-inf"], ["--config.grad_clip=-inf"]),
        (["--config.deterministic=maybe"], ["--config.deterministic=maybe", "True or False"]),
        (["--config.run_name=None"], ["--config.run_name=None"]),
        (["--config.run_name=a\nb"], ["--config.run_name='a\\nb'"]),
        (["--config.tags=a,,b"], ["--config.tags=a,,b"]),
        (["--config.tags=a", "--config.tags=a"], ["tags=('a', 'a')"]),
        (["--config.schedule=linear"], ["--config.schedule=linear", "one of constant, cosine, wsd"]),
        (["--config.use_fp8"], ["use_fp8=True needs to know the formats", "--config.formats=E4M3"]),
        (["--config.formats=E4M3"], ["formats=('E4M3',) has no effect with use_fp8=False", "set use_fp8=True"]),
        (["--config.use_fp8", "--config.formats=E4M9"], ["a rule 'E4M9'", "give one of E4M3"]),
        (["--config.formats=E4M3,E4M3"], ["--config.formats=E4M3,E4M3", "each once"]),
        (["--config.scaling=delayed,tensor"], ["--config.scaling=delayed,tensor", "three of them for W, A and G"]),
        (["--config.optimizer=sgd"], ["--config.optimizer=sgd", "adamw", "ulp_adamw"]),
        (["--config.n_head=5"], ["n_embd=384", "n_head=5"]),
        (["--resume=maybe"], ["--resume=maybe", "auto", "never", "1000"]),
        (["--resume=-1"], ["--resume=-1"]),
        (["--resume=2147483648"], ["--resume=2147483648"]),
        (["--resume="], ["--resume= cannot"]),
        (["--data_dir="], ["--data_dir=''"]),
        (["--workdir=gs://bucket/x"], ["--workdir='gs://bucket/x'", "local folder"]),
        (["--workdir=pyproject.toml"], ["--workdir=pyproject.toml is a file"]),
        (["--data_dir=pyproject.toml"], ["--data_dir=pyproject.toml is a file"]),
    ],
)
def test_refused(arguments, words):
    message = refusal(CONFIG, *arguments)
    for word in words:
        assert word in message
    assert len(message) < 400


@pytest.mark.parametrize(
    "spec, words",
    [
        ("configs/smok.py", ["configs/smok.py does not exist", "did you mean configs/smoke.py?"]),
        ("smoke", ["does not exist", BASELINE]),
        ("configs", ["not a file", BASELINE]),
        ("", ["not a file"]),
        ("x" * 5000, ["does not exist"]),
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
        ("x = (", ["line 1 of", "SyntaxError"]),
        ("\n1 / 0", ["line 2 of", "ZeroDivisionError: division by zero"]),
        ("import no_such_module", ["line 1 of", "No module named 'no_such_module'"]),
        ("import sys\nsys.exit(0)", ["line 2 of", "SystemExit"]),
        ("\0", ["null bytes"]),
        ("get_config = 3", ["no function get_config()"]),
        ("def get_config(): return {}", ["returned a dict", "ConfigDict"]),
        ("def get_config(): pass", ["returned a NoneType"]),
        ("def get_config(name): pass", ["needs an argument", ":ARGUMENT"]),
        (GOOD + "    config.batchsize = 8\n", ["line 4 of", "'batchsize'", "did you mean batch_size?"]),
        (
            GOOD + "    config.n_layer = 'six'\n",
            ["line 4 of", "n_layer='six' (str) cannot be used: give a whole number from 1"],
        ),
        (GOOD + "    with config.unlocked(): config[5] = 1\n    return config\n", ["whose name is no text"]),
        ("import ml_collections\nget_config = ml_collections.FrozenConfigDict", ["returned a FrozenConfigDict"]),
        ("class E(Exception):\n    def __str__(self): 1 / 0\nraise E", ["line 3 of", "E"]),
        ("raise ValueError('\\x1b[31m')", ["ValueError: \\x1b[31m"]),
        (GOOD + "    config.dropout = float('nan')\n    return config\n", ["dropout=nan cannot be used"]),
        (GOOD + "    config.n_layer = True\n    return config\n", ["n_layer=True (bool)"]),
        (
            "import ml_collections\ndef get_config(): return ml_collections.ConfigDict({'seed': {}})\n",
            ["--config.seed cannot replace", "default_config()"],
        ),
    ],
)
def test_refused_config_files(tmp_path, body, words):
    path = config_file(tmp_path, body)
    message = refusal(f"--config={path}", *(["--config.seed=1"] if "cannot replace" in words[0] else []))
    for word in words:
        assert word in message


@pytest.mark.parametrize("body", ["raise UserError('own words')", "def get_config(): raise UserError('own words')"])
def test_a_config_file_may_refuse_in_its_own_words(tmp_path, body):
    path = config_file(tmp_path, "from altgrad_jax.errors import UserError\n" + body)
    assert refusal(f"--config={path}") == "own words"


def test_no_config_names_the_baseline():
    assert f"--config {BASELINE}" in refusal()
    assert f"--config {BASELINE}" in refusal("--config.seed=1")


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_can_be_set_by_a_flag(name):
    default = FIELDS[name].default
    text = ",".join(default) if isinstance(default, tuple) else str(default)
    config, _ = parse(CONFIG, f"--config.{name}={text}")
    assert config[name] == default and type(config[name]) is type(default)


# --- how a script ends ----------------------------------------------------------------------------


def ends(capsys, function, *arguments, **keywords):
    """(exit code, stdout, stderr) of a function that ends the process."""
    with pytest.raises(SystemExit) as caught:
        function(*arguments, **keywords)
    return caught.value.code, *capsys.readouterr()


def test_main_runs_with_the_config_and_exits_with_its_code(capsys):
    def run(config, *, data_dir, workdir, resume):
        print(config.seed, data_dir, workdir, resume)
        return 3

    got = ends(capsys, cli.main, run, usage="", argv=[CONFIG, "--config.seed=7", "--workdir=w"])
    assert got == (3, "7 data/gpt2 w auto\n", "")


def test_main_says_what_is_wrong_and_does_not_run(capsys):
    code, out, err = ends(capsys, cli.main, pytest.fail, usage="", argv=[CONFIG, "--config.seed=x"])
    assert (code, out) == (2, "")
    assert err.startswith("error: --config.seed=x cannot be used") and err.count("\n") == 1


@pytest.mark.parametrize("argv", [["--help"], ["-h"], [CONFIG, "--config.nonsense=1", "--help"]])
def test_help(capsys, argv):
    flags = (*cli.TRAIN_FLAGS, cli.Flag("extra", "7", "an extra flag", int))
    usage = "\nTrains.\n\n  By example.\n"
    code, out, err = ends(capsys, cli.main, pytest.fail, usage=usage, flags=flags, argv=argv)
    assert (code, err) == (0, "")
    assert out.startswith("Trains.\n\n  By example.\n")
    assert max(map(len, out.split("\n"))) <= 100
    for name in ("config", "data_dir", "workdir", "resume", "extra"):
        assert f"  --{name} " in out
    assert "[default 7]" in out
    for name in FIELDS:
        assert f"\n  {name}=" in out


def test_run_script(capsys):
    def fails(error):
        raise error

    assert ends(capsys, cli.run_script, lambda: 5)[0] == 5
    assert ends(capsys, cli.run_script, lambda: None)[0] == 0
    assert ends(capsys, cli.run_script, lambda: fails(UserError("no."))) == (2, "", "error: no.\n")
    assert ends(capsys, cli.run_script, lambda: fails(KeyboardInterrupt())) == (130, "", "interrupted\n")
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        cli.run_script(lambda: fails(ZeroDivisionError()))


def test_as_a_process(tmp_path):
    """By path, from elsewhere, as scripts/train.py is run: sys.path[0] is the script's folder."""
    script = tmp_path / "script.py"
    script.write_text(
        "from altgrad_jax import cli\ncli.main(lambda config, **flags: print(config.run_name) or 7, usage='U')\n"
    )

    def process(*argv, **keywords):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, str(script), *argv],
            cwd=tmp_path,
            env=environment,
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


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--config.seed=\u0663", ["seed=\u0663 cannot be used"]),  # int() reads it as 3
        ("--config.learning_rate=\u0661.5", ["learning_rate=\u0661.5 cannot be used"]),
        ("--workdir=~no-such-user/x", ["~no-such-user/x", "local folder"]),
        ("--config.checkpoint_dir=~no-such-user/x", ["~no-such-user/x", "unknown user"]),
    ],
)
def test_what_python_would_take_and_a_reader_would_not(argument, words):
    message = refusal(CONFIG, argument)
    for word in words:
        assert word in message


def test_a_home_folder_is_named_by_its_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert parse(CONFIG, "--data_dir=~/tokens")[1]["data_dir"] == "/home/someone/tokens"


@pytest.mark.parametrize("text", ["", "{folder}", "{folder}/none/a.json", "/proc/none/a.json"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, text):
    with pytest.raises(UserError, match="--json=.* cannot be used: give the name of a file in a folder that exists"):
        cli.output_file("json")(text.format(folder=tmp_path))
    assert cli.output_file("json")(f"{tmp_path}/a.json") == f"{tmp_path}/a.json"


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "the following arguments are required: run; --help lists what to give"),
        (["x", "--step=1_0"], "argument --step: '1_0' is not a whole number; --help lists what to give"),
        (["x", "--step=\u0663"], "argument --step: '\u0663' is not a whole number; --help lists what to give"),
        (["x", "--out="], "argument --out: it is empty; --help lists what to give"),
        (["x", "--st=1"], "unrecognized arguments: --st=1; --help lists what to give"),
    ],
)
def test_a_script_with_arguments_refuses_in_one_sentence(words, message):
    parser = cli.ArgumentParser("what it does")
    parser.add_argument("run")
    parser.add_argument("--step", type=cli.whole_number)
    parser.add_argument("--out", type=cli.some_text)
    with pytest.raises(UserError) as caught:
        parser.parse_args(words)
    assert str(caught.value) == message


def test_an_error_can_be_printed_whatever_it_quotes():
    assert str(UserError("a\nb\x1b[31m\ud800 caf\u00e9")) == r"a\nb\x1b[31m\ud800 caf\u00e9".replace(
        r"\u00e9", "\u00e9"
    )
    assert str(UserError("2 settings:\n  - a\n  - b")) == "2 settings:\n  - a\n  - b"


@pytest.mark.parametrize("port", ["0", "65536", "99999", "x", ""])
def test_a_coordinator_needs_a_port(port):
    with pytest.raises(UserError, match=f"--coordinator=node:{port} cannot be used"):
        check_flags("off", f"node:{port}", 2, 0)
