"""Bad input of every kind: a part of the campaign, and that the campaign sees what it is there to see."""

import ast
from pathlib import Path

import pytest
from campaigns import inputs, runs
from campaigns.case import ROOT, Case, Script

from altgrad_jax.errors import UserError


def test_every_bad_input_is_answered_in_one_sentence_and_nothing_is_written(tmp_path):
    outcome = inputs.run(tmp_path, seed=0, n=45, every=13)
    assert not outcome.failures, outcome.part()
    assert outcome.given == outcome.answered > 130
    assert {"command lines", "token files", "setting: from Python"} <= {row.kind for row in outcome.rows}
    assert not list(tmp_path.iterdir())


def test_the_same_seed_draws_the_same_settings():
    def drawn(seed):
        return [(case.kind, case.what) for case in inputs.config_cases(seed, 20)]

    assert drawn(3) == drawn(3) != drawn(4)


def refuse(message):
    def call():
        raise UserError(message)

    return call


def leave(folder, name):
    def call():
        (folder / name).write_text("half")
        raise UserError("x=1 cannot be used: give 2")

    return call


@pytest.mark.parametrize("make, expected, wrong", [
    (lambda folder: refuse("x=1 cannot be used: give 2"), "refused", None),
    (lambda folder: lambda: None, "refused", "accepted wrongly"),
    (lambda folder: lambda: None, "harmless", None),
    (lambda folder: refuse("x=1 cannot be used: give 2"), "accepted", "refused wrongly"),
    (lambda folder: lambda: 1 / 0, "refused", "tracebacks"),
    (lambda folder: refuse("it cannot be used: give 2"), "refused", "unclear"),  # does not name x=1
    (lambda folder: refuse("x=1 cannot be used"), "refused", "unclear"),  # does not say what to do
    (lambda folder: refuse("2 settings cannot be used:\n  - x=1: give 2"), "refused", "unclear"),  # one line is missing
    (lambda folder: refuse("2 settings cannot be used:\n  - x=1: give 2\n  - y: give 3"), "refused", None),
    (lambda folder: leave(folder, "new"), "refused", "half-written"),
    (lambda folder: leave(folder, "out"), "harmless", None),
    (lambda folder: leave(folder.parent / "here", "new"), "refused", "half-written"),
    (lambda folder: __import__("threading").Event().wait, "refused", "hangs"),
])  # fmt: skip
def test_the_campaign_tells_a_wrong_answer(tmp_path, make, expected, wrong):
    (tmp_path / "here").mkdir()
    case = Case("kind", "what", make, ("x=1",), expected)
    assert inputs.judge(case, tmp_path / "case", tmp_path / "here", limit_s=0.2)[0] == wrong
    assert not (tmp_path / "case").exists()


def test_the_table_adds_up(tmp_path, monkeypatch):
    cases = [
        Case("a", "1", lambda folder: refuse("x: give 2")),
        Case("a", "1", lambda folder: refuse("x: give 2")),
        Case("b", "2", lambda folder: lambda: None),
        Case("b", "3", lambda folder: lambda: 1 / 0),
    ]
    monkeypatch.setattr(inputs, "all_cases", lambda *_, **__: cases)
    outcome = inputs.run(tmp_path, seed=0, n=1, say=lambda text: None)
    assert [cells[:5] for cells in outcome.table()[1:]] == [("a", 1, 1, 0, 0), ("b", 2, 0, 1, 0), ("all", 3, 1, 1, 0)]
    assert [failure[2] for failure in outcome.failures] == ["accepted wrongly", "tracebacks"]
    text = "\n".join(runs.summary([outcome.part()]))
    assert "| all | 3 | 1 |" in text and "ZeroDivisionError" in text


def test_a_script_is_stopped_at_its_limits(tmp_path):
    (tmp_path / "here").mkdir()
    case = Case("kind", "what", lambda folder: Script(("report.py", "--help")))
    assert inputs.judge(case, tmp_path / "case", tmp_path / "here")[0] == "accepted wrongly"
    case = Case("kind", "what", lambda folder: Script(("report.py", "--help"), memory=2**20))
    assert inputs.judge(case, tmp_path / "case", tmp_path / "here")[0] == "tracebacks"


# What runs code that came with data, or a shell. The one exception is cli.load_config: a config file is a program of
# the user's own.
FORBIDDEN = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "torch.load"}
FORBIDDEN_ATTRIBUTES = {"extractall", "extract", "unpack_archive"}
FORBIDDEN_KEYWORDS = {"allow_pickle", "trust_remote_code", "shell"}


def dangers(source):
    """(line, what) of what a source does that may run foreign code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            for name in names:
                if name.split(".")[0] in FORBIDDEN:
                    yield node.lineno, name
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS or name.rpartition(".")[2] in FORBIDDEN_ATTRIBUTES:
                yield node.lineno, name
            for keyword in node.keywords:
                if keyword.arg in FORBIDDEN_KEYWORDS and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    yield node.lineno, keyword.arg


def test_nothing_runs_code_that_came_with_data():
    found = {
        (path.relative_to(ROOT).as_posix(), what)
        for folder in ("altgrad_jax", "scripts")
        for path in Path(ROOT / folder).rglob("*.py")
        for _, what in dangers(path.read_text())
    }
    assert found == {("altgrad_jax/cli.py", "exec")}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib as j",
        "eval(x)",
        "exec(x)",
        "os.system(x)",
        "archive.extractall(x)",
        "np.load(x, allow_pickle=True)",
        "f(trust_remote_code=flag)",
        "subprocess.run(x, shell=True)",
        "shutil.unpack_archive(x)",
        "torch.load(x)",
    ],
)
def test_the_scan_finds_what_it_looks_for(source):
    assert list(dangers(source))
