"""The console commands, the commands and Python of the documentation, and sweeps as jobs."""

import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import submitit  # noqa: F401  # it sets logging up anew, which closes what pytest captures into if a test does it
from campaigns import docs_commands as docs
from test_conventions import own_tokenizer

from altgrad_jax import cli, commands
from altgrad_jax.errors import UserError
from altgrad_jax.files import shipped
from altgrad_jax.run import launch

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_each_command_is_a_script_in_the_wheel():
    shipped_files = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for command, target in PROJECT["project"]["scripts"].items():
        module, _, name = target.partition(":")
        assert module == "altgrad_jax.commands" and getattr(commands, name).args == (name,)
        assert command == f"altgrad-{name.replace('_', '-')}"
        assert shipped_files[f"scripts/{name}.py"] == f"altgrad_jax/_scripts/{name}.py"
        assert "import installed" in (ROOT / "scripts" / f"{name}.py").read_text()
    for inside, outside in ((value, key) for key, value in shipped_files.items()):
        assert (ROOT / outside).exists() and inside.startswith(("altgrad_jax/_scripts", "altgrad_jax/_configs"))


def test_a_command_names_itself_and_finds_the_configs_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(cli, "command", None)
    monkeypatch.setattr(sys, "argv", ["altgrad-train", "--help"])
    with pytest.raises(SystemExit) as end:
        commands.train()
    said = capsys.readouterr().out
    assert end.value.code == 0 and "altgrad-train --config bf16_baseline" in said and "scripts/train.py" not in said
    assert cli.load_config("fp8:E5M2").formats == ("E5M2",)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "fp8.py").write_text("get_config = 1\n")
    with pytest.raises(UserError, match="configs/fp8.py has no function get_config"):  # the nearer one
        cli.load_config("fp8")
    (tmp_path / "small").mkdir()  # a folder is no config
    assert cli.load_config("small").run_name == "small"


def test_the_package_takes_what_is_inside_it_before_what_is_beside_it(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    monkeypatch.setattr("altgrad_jax.files.__file__", str(tmp_path / "package" / "files.py"))
    assert shipped("configs") == tmp_path / "configs"
    (tmp_path / "package" / "_configs").mkdir()
    assert shipped("configs") == tmp_path / "package" / "_configs"


@pytest.mark.parametrize("has_environment", [False, True])
def test_outside_its_environment_a_script_is_one_sentence(tmp_path, has_environment):
    problem = runpy.run_path(str(ROOT / "scripts" / "installed" / "__init__.py"))["problem"]
    assert problem(str(tmp_path)) is None
    if has_environment:
        (tmp_path / ".venv/bin").mkdir(parents=True)
        (tmp_path / ".venv/bin/python").touch()
    # -I -S: without this environment's packages.
    words = [sys.executable, "-I", "-S", str(ROOT / "scripts" / "train.py"), "--help"]
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import installed"
    done = subprocess.run([*words[:3], "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: altgrad_jax is not installed for {sys.executable}: ")
    monkey = problem.__globals__
    monkey["NEEDED"] = ("no_such_package",)
    expected = ".venv/bin/python, or activate" if has_environment else "run `make train` once"
    assert expected in problem(str(tmp_path))


# --- documentation ----------------------------------------------------------------------------------------------------


ITEMS = [item for page in docs.PAGES for item in docs.items(page)]


def script_of(command: str) -> list[str] | None:
    """The words of a documented command, the script's name first; None for what is no script, and for an excerpt."""
    match = re.search(r"(?:python scripts/(\w+)\.py|\baltgrad-([a-z-]+))(?= |$)(.*)", command)
    if match is None or "..." in command:
        return None
    return [match[1] or match[2].replace("-", "_"), *shlex.split(match[3])]


DOCUMENTED = [(item.page, *words) for item in ITEMS if not item.python and (words := script_of(item.text))]


@pytest.fixture
def what_the_pages_name(tmp_path, monkeypatch):
    """The folder in which a reader types: configs, the files whose text a page shows, and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for item in ITEMS:
        if item.file:
            (tmp_path / item.file).write_text(item.text)
    (tmp_path / "mine").mkdir()
    own_tokenizer("bpe", tmp_path / "mine" / "tokenizer.json")


@pytest.mark.parametrize("words", DOCUMENTED, ids=" ".join)
def test_a_documented_command_has_flags_and_settings_that_exist(words, what_the_pages_name):
    _, name, *rest = words
    path = ROOT / "scripts" / f"{name}.py"
    script = runpy.run_path(str(path))
    takes_config = "config=True" in path.read_text()
    rest = [word for word in rest if word not in ("--help", "|", "&&")]
    rest = [re.sub(r"\$\w+|\$\(.*\)", "1", word) for word in rest]
    cli.parse(rest, script["FLAGS"], config=takes_config, arguments=script.get("ARGUMENTS", ()))


def test_every_line_of_a_block_is_a_known_command():
    unknown = [f"{item.page}: {item.text}" for item in ITEMS if not item.python and not docs.COMMAND.match(item.text)]
    assert not unknown, "add the program to COMMAND, or the block to OUTPUT, in tests/campaigns/docs_commands.py"


@pytest.mark.parametrize("page", dict.fromkeys(item.page for item in ITEMS))
def test_every_command_of_a_page_was_run_by_the_campaign(page):
    found = docs.outcomes(docs.RESULTS.read_text()).get(page)
    fix = "run tests/campaigns/docs_commands.py for the page, and put its docs-commands.md under docs/results/"
    assert found == [(item.name, item.not_run or "0") for item in ITEMS if item.page == page], fix


def test_the_campaign_has_no_rule_without_a_command():
    texts = [item.text for item in ITEMS]
    known = texts + [f"{item.page}: {item.text}" for item in ITEMS]
    lines = texts + [line for page in docs.PAGES for line in docs.BEFORE.get(page, ())]
    unused = [start for start, _ in docs.NOT_RUN if not any(text.startswith(start) for text in known)]
    unused += [pattern for pattern, _ in docs.SMALLER if not any(re.search(pattern, line) for line in lines)]
    unused += [word for word in (*docs.WORDS, *docs.XLA_FLAGS) if not any(word in text for text in texts)]
    unused += [start for page, start in docs.OUTPUT if not any(text.startswith(start) for _, text in docs.blocks(page))]
    assert not unused and set(docs.BEFORE) <= set(docs.PAGES)


def python_of(page: str) -> str:
    return "\n".join(text for language, text in docs.blocks(page) if language == "python")


def test_the_python_of_your_recipe_runs(capsys):
    exec(python_of("your_recipe.md"), {})
    assert "recipe mine" in capsys.readouterr().out


def test_the_python_of_reading_a_run_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "checkpoints" / "e4m3"
    run.mkdir(parents=True)
    rows = ['{"step": 1, "loss": 2, "val_loss": 3, "grad_norm": "NaN", "grad_norm/block_0/mlp_up": 4}\n']
    (run / "metrics.jsonl").write_text("".join(rows))
    (run / "manifest.json").write_text(
        '{"schema_version": 6, "run_id": "a", "config": {"formats": ["E4M3"]}, "starts": [],'
        ' "data": {"fingerprint": "b"}}'
    )
    (run / "verdict.json").write_text('{"sound": true, "best_val_loss": 3, "validation": []}')
    exec(python_of("reading_a_run.md"), {})
    said = capsys.readouterr().out
    assert "['E4M3']" in said and "block_0/mlp_up    4.0" in said and "True" in said


# --- jobs -------------------------------------------------------------------------------------------------------------

JOB = """
import os, pathlib, signal, sys, time
folder, shard = pathlib.Path(sys.argv[1]), sys.argv[-1].removeprefix("--shard=").replace("/", "of")
log = folder / shard
def save(*_):
    with log.open("a") as file: file.write("saved ")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
again = log.exists()
with log.open("a") as file: file.write("resumed " if again else f"started:{os.environ.get('CUDA_VISIBLE_DEVICES')} ")
(folder / f"{shard}.pid").write_text(str(os.getppid()))
while shard == "1of2" and not again: time.sleep(0.05)
sys.exit(4 if shard == "2of2" else 0)
"""


@pytest.mark.filterwarnings("ignore")
def test_a_preempted_job_saves_and_goes_on_with_its_slice(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    (tmp_path / "job.py").write_text(JOB)
    tell = launch.tell

    def preempt(text):
        """Once the jobs are started: what SLURM's preemption sends the first."""
        tell(text)
        if "jobs of local" in text:
            pid, deadline = tmp_path / "1of2.pid", time.monotonic() + 60
            while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
                time.sleep(0.05)
            os.kill(int(pid.read_text()), signal.SIGUSR2)

    monkeypatch.setattr(launch, "tell", preempt)
    words = [sys.executable, str(tmp_path / "job.py"), str(tmp_path)]
    assert launch.launch("local", words, tmp_path / "out", jobs=2, minutes=60) == 4
    assert (tmp_path / "1of2").read_text() == "started:3 saved resumed "
    assert (tmp_path / "2of2").read_text() == "started:3 "
    assert "job 2 of 2 ended with exit code 4" in capsys.readouterr().out


def test_the_command_of_a_job_is_that_of_the_sweep_without_its_launch():
    """With the jobs still asked for, a job is refused: `--jobs` has no effect without `--launch`."""
    flags = runpy.run_path(str(ROOT / "scripts" / "sweep.py"))["FLAGS"]
    words = ["--config=small", "--axes=seed=0,1", "--launch=slurm", "--jobs=2", "--slurm=partition=gpu"]
    _, values = cli.parse([*words, *launch.flags_of_slice(2, 2)], flags)
    assert (values["launch"], values["jobs"], values["slurm"], values["shard"]) == ("none", 1, "", "2/2")


def test_options_of_slurm():
    assert launch.parse_options("partition=gpu, gpus-per-node=1,exclusive") == {
        "partition": "gpu",
        "gpus-per-node": "1",
        "exclusive": True,
    }
    assert launch.parse_options("") == {}
    for wrong in ("=gpu", "partition=", "a=1,a=2"):
        with pytest.raises(UserError, match="sbatch's long options"):
            launch.parse_options(wrong)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--launch=local", "--jobs=9"], "--jobs=9: give 2 at most"),
        (["--launch=local", "--slurm=partition=a"], "no effect with --launch=local"),
        (["--launch=slurm", "--dry_run"], "--dry_run starts no job"),
        (["--jobs=2"], "no effect without --launch"),
    ],
)
def test_launching_is_refused_before_anything_is_started(words, sentence):
    script = runpy.run_path(str(ROOT / "scripts" / "sweep.py"))
    config, values = cli.parse(["--config=small", "--axes=seed=0,1", *words], script["FLAGS"])
    with pytest.raises(UserError, match=sentence):
        script["run"](config, **values)
