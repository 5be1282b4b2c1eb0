"""Every command of the README and of docs/ run for real, small: what a reader types does what the page says.

    python tests/campaigns/docs_commands.py OUT [PAGE ...]        # pages by name, such as quickstart.md; by default all

A page's commands run in its order in a folder of its own below OUT, so that a later one finds what an earlier one made.
Runs are made small by settings that are appended (SMALLER), names that stand for something are replaced (WORDS), and
what a page takes for granted is made first (BEFORE). Python that is a whole program runs too. What cannot run is in
NOT_RUN, with its reason. Writes a log for each page, and OUT/docs-commands.md, in which pages that were not asked for
are as they are in docs/results/. Exits with 1 if a command failed. The sample of six EU acts is fetched from a package
index. CPU; W&B is off.
"""

import argparse
import concurrent.futures
import dataclasses
import gzip
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", *sorted(path.name for path in (ROOT / "docs").glob("*.md")))
RESULTS = ROOT / "docs" / "results" / "docs-commands.md"
COMMAND = re.compile(r"(?:python|altgrad-[a-z-]+|pip|make|bash|srun|\.) ")
LIMIT_S = 1800.0

# First lines of blocks that are no commands: (page, how the block begins).
OUTPUT = (
    ("README.md", "bf16-baseline: 30,044,544"),
    ("checkpoints.md", "<run folder>/"),
    ("checkpoints.md", ">>> import orbax"),
    ("checkpoints.md", '>>> manager = ocp.CheckpointManager("/tmp/smoke")'),
)

# (how the command or the Python begins, why it is not run); `PAGE: ` in front limits it to a page.
FRAGMENT = "a fragment, which needs a model of the reader's"
NOT_RUN = (
    ("pip install", "changes the environment"),
    ("make ", "sets up an environment, and runs what stands here on its own"),
    (". .venv", "the reader's environment"),
    ("srun ", "needs SLURM"),
    ("altgrad-sweep --config=matrix --out=runs/matrix --data_dir=data/bytes --launch=slurm", "needs SLURM"),
    ("altgrad-prepare-data --source=eurlex57k", "downloads EURLEX57K"),
    ("python scripts/prepare_data.py --source eurlex57k", "downloads EURLEX57K"),
    ("python scripts/inspect_program.py", "needs the extra gpu-program; `make gpu-program` runs its programs"),
    ("python scripts/train.py ... --coordinator", "needs Kubernetes"),
    ("bash scripts/gpu_suite.sh", "needs a GPU"),
    ("inst = altgrad_jax.instrument", FRAGMENT),
    ("from altgrad_jax.numerics.whatif", "a fragment: `line` is a line of diagnostics.jsonl"),
    ("your_model.md: import jax", FRAGMENT),
    ("your_model.md: with Recorder", FRAGMENT),
    ("your_model.md: optimizer =", FRAGMENT),
    ("your_recipe.md: from altgrad_jax import Recipe", "tests/test_commands.py runs it"),
    ("reading_a_run.md: ", "tests/test_commands.py runs it"),
)

_MODEL = "--config.n_layer=2 --config.n_head=2 --config.n_embd=64 --config.block_size=64"
_RUN = "--config.max_steps=4 --config.batch_size=4 --config.eval_windows=8 --config.eval_batch_size=4"
_EVERY = "--config.eval_interval=2 --config.checkpoint_interval=2 --config.diagnostic_interval=2"
_TRAIN = f"{_MODEL} {_RUN} {_EVERY} --config.metrics=none"
_SWEEP = "--config.max_steps=4 --config.eval_windows=8 --config.eval_interval=2 --config.checkpoint_interval=4"
# (what the command matches, what is appended to it); all that match are.
SMALLER = (
    (r"scripts/train\.py|altgrad-train", _TRAIN),
    (r"fsdp=8", "--config.batch_size=8 --config.eval_batch_size=8"),
    (r"scripts/bench\.py", f"{_MODEL} --config.batch_size=2 --rounds=1 --budget_s=30"),
    (r"scripts/sweep\.py|altgrad-sweep", _SWEEP),
    (r"config[= ]\S*matrix", "--shard=1/100"),
    (r"configs/court\.py", "--shard=1/80"),
    (r"scripts/certify\.py", "--draws=4"),
    (r"scripts/certify\.py .*--oscillation", "--oscillation=2"),
    (r"scripts/precision_map\.py", "--draws=2"),
    (r"scripts/precision_map\.py .*--train", "--seeds=2 --cells=1 --max_steps=4"),
    (r"oscillation_reset", "--config.oscillation_reset=4"),
    (r"finetune_gpt2", "--steps=2 --block_size=32 --batch_size=2"),
    (r"fault_campaign", "--parts=kills --kills=1"),
    (r"coordinator=node0", "--num_processes=1"),
    (r"scripts/sample\.py|altgrad-sample", "--max_new_tokens=8"),
)
# What is replaced in a command or in Python.
WORDS = {
    "RUN ": "checkpoints/nvfp4 ",
    "FOLDER": "gpt2-eurlex",
    "--config.n_layer=12 ...": "",
    "@1600": "@2",
    "node0:8476": "localhost:8476",
    "config.max_steps, config.run_name, config.checkpoint_dir = 300,": (
        "config.n_layer, config.n_embd, config.n_head, config.block_size = 2, 64, 2, 64\n"
        "config.max_steps, config.run_name, config.checkpoint_dir = 4,"
    ),
}
# {what the command holds: further XLA_FLAGS}.
XLA_FLAGS = {"fsdp=8": "--xla_force_host_platform_device_count=8"}

_BASELINE, _NVFP4 = "altgrad-train --config=bf16_baseline", "altgrad-train --config=recipe:nvfp4"
_EXPORT = "altgrad-export-hf checkpoints/bf16_baseline gpt2-eurlex"
_MATRIX = "altgrad-sweep --config=matrix --out=runs/matrix --data_dir=data/bytes"
_TOKENS = "mkdir -p data && ln -s ../../data/gpt2 ../../data/bytes data/"
_ACTS = "cp ../data/acts.jsonl.gz . && gunzip -k acts.jsonl.gz"
_TOKENIZER = (
    "mkdir mine && python -c \"import sys; sys.path.insert(0, 'tests'); import test_conventions as t; "
    "t.own_tokenizer('bpe', 'mine/tokenizer.json')\""
)
_RANDOM = (
    'mkdir -p data/random && python -c "import numpy as np; r = np.random.default_rng(0); '
    "[r.integers(0, 50257, 4096, dtype='uint16').tofile(f'data/random/{name}.bin') for name in ('train', 'val')]\""
)
# What a page takes for granted: commands that run before its own.
BEFORE = {
    "README.md": (_TOKENS,),
    "benchmark.md": (_TOKENS,),
    "bias.md": (_TOKENS, _BASELINE, _NVFP4),
    "cluster.md": (_TOKENS, _MATRIX),
    "models.md": (_TOKENS, _BASELINE, _EXPORT, "mkdir downloaded && cp -r gpt2-eurlex downloaded/gpt2"),
    "recipes.md": (_TOKENS,),
    "scaling.md": (_TOKENS,),
    "your_data.md": (_ACTS, _TOKENIZER, _RANDOM),
    "your_format.md": (_TOKENS,),
    "your_recipe.md": (_TOKENS,),
}


@dataclasses.dataclass(frozen=True)
class Item:
    """A command of a page, or a block of its Python.

    Attributes:
      text: as documented, on one line for a command, without its comment.
      python: whether it is Python.
    """

    page: str
    text: str
    python: bool = False

    @property
    def name(self) -> str:
        """What stands for it in a table."""
        return self.text.splitlines()[0] + (" ..." if self.python else "")

    @property
    def file(self) -> str | None:
        """The name of a file that the page shows, or None."""
        name = re.match(r"# (\w+\.py)\n", self.text)
        return name and name[1]

    @property
    def not_run(self) -> str | None:
        """Why it is not run, or None."""
        if self.file:
            return "a file that the page's commands use"
        for start, reason in NOT_RUN:
            if self.text.startswith(start) or f"{self.page}: {self.text}".startswith(start):
                return reason
        return None


def source(page: str) -> str:
    """The text of a page, lines that go on joined."""
    path = ROOT / page if page == "README.md" else ROOT / "docs" / page
    return re.sub(r" *\\\n +", " ", path.read_text())


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of each block of code, fenced or indented, in the order of the page."""
    pattern = r"^```(\w*)\n(.*?)^```$|(?<=\n\n)((?:    [^\n]*\n)+)"
    found = re.findall(pattern, source(page), re.M | re.S)
    return [(language, fenced or re.sub(r"^    ", "", indented, flags=re.M)) for language, fenced, indented in found]


def items(page: str) -> list[Item]:
    """Commands and Python of a page in its order."""
    found = []
    for language, text in blocks(page):
        if language == "python":
            found.append(Item(page, text, python=True))
        elif not any(page == where and text.startswith(start) for where, start in OUTPUT):
            lines = [re.sub(r"(^| +)#.*", "", line) for line in text.splitlines()]
            found += [Item(page, line) for line in lines if line]
    return found


def command(text: str) -> str:
    """The line for a shell that runs a documented command, small."""
    small = " ".join([text, *(extra for pattern, extra in SMALLER if re.search(pattern, text))])
    return replaced(small)


def replaced(text: str) -> str:
    for word, other in WORDS.items():
        text = text.replace(word, other)
    return text


def shell(line: str, folder: Path, log: Path) -> int:
    """The exit code of a line that bash runs in `folder`; its output goes to the end of `log`."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    xla = [os.environ.get("XLA_FLAGS", ""), *(more for word, more in XLA_FLAGS.items() if word in line)]
    environment = dict(
        PATH=path, PYTHONPATH=str(ROOT), XLA_FLAGS=" ".join(xla), JAX_PLATFORMS="cpu", WANDB_MODE="disabled"
    )
    with log.open("a") as output:
        print(f"$ {line}", file=output, flush=True)
        try:
            done = subprocess.run(
                ["bash", "-c", line],
                cwd=folder,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=LIMIT_S,
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = 124
        print(f"[exit code {code}]\n", file=output)
    return code


def run_page(page: str, out: Path) -> list[tuple[Item, int | None]]:
    """(item, exit code or None where it is not run) of everything on a page."""
    folder, log = out / page.removesuffix(".md"), out / f"{page.removesuffix('.md')}.log"
    folder.mkdir()
    for name in ("scripts", "configs", "examples", "tests"):
        (folder / name).symlink_to(ROOT / name)
    for line in BEFORE.get(page, ()):
        code = shell(command(line), folder, log)
        if code:
            raise RuntimeError(f"{page}: what the page takes for granted failed: {line}; see {log}")
    rows = []
    for item in items(page):
        if item.file:
            (folder / item.file).write_text(item.text)
        if item.not_run:
            rows.append((item, None))
            continue
        if item.python:
            (folder / "block.py").write_text(replaced(item.text))
        started = time.monotonic()
        code = shell("python block.py" if item.python else command(item.text), folder, log)
        print(f"{page}: {code} {time.monotonic() - started:.0f} s: {item.name}", file=sys.stderr, flush=True)
        rows.append((item, code))
    return rows


def sample(out: Path) -> None:
    """The sample's acts as documents and as token files of both tokenizers, for the pages."""
    from altgrad_jax.data.sources import get_source  # jax takes seconds to start

    data = out / "data"
    data.mkdir(parents=True)
    with gzip.open(data / "acts.jsonl.gz", "wt") as file:
        for document in get_source("sample").documents():
            print(json.dumps({"text": document.text}), file=file)
    for tokenizer in ("gpt2", "bytes"):
        line = f"altgrad-prepare-data --input acts.jsonl.gz --tokenizer {tokenizer} --out {tokenizer}"
        code = shell(line, data, out / "data.log")
        if code:
            raise RuntimeError(f"the sample could not be prepared; see {out / 'data.log'}")


def section(page: str, rows: list[tuple[Item, int | None]]) -> str:
    """What the results say of one page."""
    from altgrad_jax.run.device import git_commit, versions

    commit = (git_commit() or {}).get("commit", "unknown")[:10]
    lines = [
        f"## {page}",
        "",
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores, Python {platform.python_version()}, jax "
        f"{versions()['jax']}, commit {commit}.",
        "",
        "| command | exit code, or why it is not run |",
        "|---|---|",
        *(f"| `{item.name}` | {item.not_run if code is None else code} |" for item, code in rows),
        "",
    ]
    return "\n".join(lines)


def outcomes(text: str) -> dict[str, list[tuple[str, str]]]:
    """{page: (command, exit code or why it is not run) of its rows} of a page of results."""
    return {page: re.findall(r"^\| `(.*)` \| (.*) \|$", rows, re.M) for page, rows in sections(text).items()}


def sections(text: str) -> dict[str, str]:
    """{page: its section} of a page of results."""
    return {found[2]: found[1] for found in re.finditer(r"(^## (\S+)\n.*?)(?=^## |\Z)", text, re.M | re.S)}


def report(found: dict[str, str]) -> str:
    """The page of results, of {page: its section}."""
    body = "\n".join(found[page].strip() + "\n" for page in PAGES if page in found)
    missing = [page for page in PAGES if page not in found and items(page)]
    table, everything = [], []
    for page, rows in outcomes(body).items():
        codes = [int(outcome) for _, outcome in rows if outcome.isdecimal()]
        everything += codes
        table.append(f"| {page} | {len(rows)} | {len(codes)} | {sum(map(bool, codes))} | {len(rows) - len(codes)} |")
    lines = [
        "# Every command of the documentation, run",
        "",
        "Made by `make docs-commands` (`python tests/campaigns/docs_commands.py OUT`). Runs are made small by settings",
        "that it appends, and names that stand for something are replaced; its tables say which. A command passes if",
        "its exit code is 0. A block of Python is named by its first line. A test holds this page to the documentation",
        "and to 0 failures.",
        "",
        f"**{len(everything)} commands and programs were run, and {sum(map(bool, everything))} failed.**",
        "",
        *([f"Not run yet: {', '.join(missing)}.", ""] if missing else []),
        "| page | commands | run | failed | not run |",
        "|---|---:|---:|---:|---:|",
        *table,
        "",
    ]
    return "\n".join(lines) + "\n" + body


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder that is not there yet")
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="by default all")
    given = parser.parse_args()
    out, pages = given.out.resolve(), given.pages or PAGES
    if unknown := set(pages) - set(PAGES):
        parser.error(f"{', '.join(sorted(unknown))}: there is no such page; give some of {', '.join(PAGES)}")
    if out.exists():
        parser.error(f"{given.out} exists: give a folder that is not there yet")
    sample(out)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        rows = dict(zip(pages, pool.map(run_page, pages, [out] * len(pages)), strict=True))
    before = sections(RESULTS.read_text()) if given.pages and RESULTS.exists() else {}
    new = {page: section(page, rows[page]) for page in pages if rows[page]}
    (out / RESULTS.name).write_text(report(before | new))
    print(f"written: {out / RESULTS.name}")
    return any(code for page in pages for _, code in rows[page])


if __name__ == "__main__":
    sys.exit(main())
