"""Text to token files: contents, split, repeatability, and what a killed or failed preparation leaves."""

import concurrent.futures
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import numpy as np
import pytest

from altgrad_jax import files
from altgrad_jax.data import duplicates, sources
from altgrad_jax.data import prepare as prep
from altgrad_jax.data.prepare import prepare, prepare_source, resolve
from altgrad_jax.data.sources import Document, Source, SourceUnavailable
from altgrad_jax.data.tokenizer import get_tokenizer
from altgrad_jax.errors import UserError
from altgrad_jax.files import NO_LOCKS
from altgrad_jax.run.lock import locked

REPO = Path(__file__).parents[1]
BYTES = get_tokenizer("bytes")


def source(texts, splits=None, name="local", **kwargs):
    documents = [Document(s, f"#{i}", t) for i, (t, s) in enumerate(zip(texts, splits or [None] * len(texts)))]
    return Source(name, "a corpus", "CC0", "", "a document", lambda: iter(documents), **kwargs)


def make(tmp_path, texts, *args, out="data", tok=BYTES, **kwargs):
    return prepare(source(texts, *args), tmp_path / out, tok, progress=False, **kwargs)


def documents_of(path):
    """The documents of a byte-token file, each of which must be followed by the separator."""
    raw = np.fromfile(path, "<u2").astype(np.uint8).tobytes()
    assert raw.endswith(b"\xff")
    return [part.decode() for part in raw[:-1].split(b"\xff")]


def split_of(folder):
    return documents_of(folder / "train.bin"), documents_of(folder / "val.bin")


def occurs(train_T, val_T, n):
    """By a set of all stretches of n tokens."""
    known = {train_T[i : i + n].tobytes() for i in range(len(train_T) - n + 1)}
    return np.array([val_T[i : i + n].tobytes() in known for i in range(len(val_T) - n + 1)])


def test_validation_windows_that_occur_in_the_training_tokens_are_counted(monkeypatch):
    rng = np.random.default_rng(0)
    train_T, val_T = (rng.integers(0, 4, n).astype("<u2") for n in (3000, 64 * 6 + 9))
    val_T[:64] = train_T[1000:1064]  # verbatim
    val_T[100:300] = train_T[600:800]  # lies across two pieces
    val_T[160] ^= 1  # windows 2 and 3 nearly
    monkeypatch.setattr(duplicates, "_PIECE", 700)
    for n, stride in ((3, 1), (32, 1), (64, 64)):
        np.testing.assert_array_equal(
            duplicates.repeated(train_T, val_T, n, stride), occurs(train_T, val_T, n)[::stride]
        )
    found = duplicates.duplicates(train_T, val_T)
    starts = np.flatnonzero(occurs(train_T, val_T, 32))
    covered = np.zeros(len(val_T), bool)
    for start in starts:
        covered[start : start + 32] = True
    near = covered[: 6 * 64].reshape(6, 64).mean(1) >= 0.8
    assert near.tolist() == [True, False, True, True, False, False]
    assert found == {"window": 64, "windows": 6, "verbatim": round(2 / 6, 6), "near": 0.5}
    assert duplicates.duplicates(train_T, val_T[:63])["windows"] == 0


def test_files_and_meta(tmp_path):
    texts = ["eins", "", "zwei ü", " \n", "drei"]
    meta = make(tmp_path, texts, ["train", "train", "validation", "validation", "train"])
    folder = tmp_path / "data"
    assert split_of(folder) == (["eins", "drei"], ["zwei ü"])
    assert sorted(p.name for p in folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    assert json.loads((folder / "meta.json").read_text()) == meta
    assert meta["n_documents"] == {"train": 2, "val": 1} and meta["n_empty_documents"] == 2
    assert meta["n_tokens"] == {"train": 10, "val": 8} and meta["n_bytes"] == {"train.bin": 20, "val.bin": 16}
    assert (meta["schema_version"], meta["source"], meta["licence"]) == (1, "local", "CC0")
    assert (meta["tokenizer"], meta["vocab_size"], meta["largest_token"]) == ("bytes", 256, 255)
    assert (meta["split"], meta["split_seed"]) == ("source", None)
    assert meta["duplicates"] == {"window": 64, "windows": 0, "verbatim": 0.0, "near": 0.0}
    for name, digest in meta["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_gpt2_files_are_nanogpts(tmp_path):
    """Exactly what nanoGPT's prepare.py writes: per document encode_ordinary(text) + [50256], as uint16."""
    make(tmp_path, ["Hello world", "hello world<|endoftext|>"], ["train", "validation"], tok=get_tokenizer("gpt2"))
    assert np.fromfile(tmp_path / "data" / "train.bin", np.uint16).tolist() == [15496, 995, 50256]
    val = np.fromfile(tmp_path / "data" / "val.bin", np.uint16).tolist()
    assert val[:2] == [31373, 995] and val[-1] == 50256 and 50256 not in val[:-1]


TEXTS = [f"document {i}" for i in range(200)]


def test_split_by_seed(tmp_path):
    meta = make(tmp_path, TEXTS)
    train, val = split_of(tmp_path / "data")
    assert (len(train), len(val), meta["split"], meta["split_seed"]) == (190, 10, "seed", prep.SPLIT_SEED)
    assert sorted(train + val) == sorted(TEXTS)
    assert train == sorted(train, key=TEXTS.index)  # in the source's order
    make(tmp_path, TEXTS, out="other", split_seed=1)
    assert split_of(tmp_path / "other")[1] != val
    make(tmp_path, TEXTS, out="half", val_fraction=0.5)
    assert set(val) < set(split_of(tmp_path / "half")[1])


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.5, 1 - 1e-9])
def test_each_side_has_at_least_one_document(tmp_path, fraction):
    meta = make(tmp_path, ["a", "b", "c"], val_fraction=fraction)
    assert min(meta["n_documents"].values()) >= 1 and sum(meta["n_documents"].values()) == 3


@pytest.mark.parametrize("batch_chars", [1, 300, 2**22])
def test_repeatable_to_the_byte_whatever_the_batches(tmp_path, monkeypatch, batch_chars):
    make(tmp_path, TEXTS, out="one")
    monkeypatch.setattr(prep, "_BATCH_CHARS", batch_chars)
    make(tmp_path, TEXTS, out="two")
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    "texts, splits, kwargs, message",
    [
        ([], None, {}, "has 0 documents with text; at least 2"),
        (["a", " "], None, {}, r"has 1 documents with text \(1 empty ones were skipped\)"),
        (["a", "b"], ["train", "train"], {}, "no documents with text in its validation split"),
        (["a", "b"], ["validation", "validation"], {}, "no documents with text in its training split"),
        (["a", "b"], None, {"val_fraction": 0.0}, "val_fraction is 0.0; it must lie between 0 and 1"),
        (["a", "b"], None, {"val_fraction": float("nan")}, "val_fraction is nan"),
    ],
)
def test_unusable_input_leaves_nothing(tmp_path, texts, splits, kwargs, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path, texts, splits, **kwargs)
    assert list(tmp_path.iterdir()) == []


def test_existing_output(tmp_path):
    make(tmp_path, ["a", "b"])
    with pytest.raises(UserError, match="already holds token files; give --force"):
        make(tmp_path, ["c", "d"])
    make(tmp_path, ["c", "d"], force=True)
    assert sorted(sum(split_of(tmp_path / "data"), [])) == ["c", "d"]
    (tmp_path / "data" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds other files .thesis.tex."):
        make(tmp_path, ["a", "b"], force=True)
    assert (tmp_path / "data" / "thesis.tex").exists()
    with pytest.raises(UserError, match="is a file"):
        make(tmp_path, ["a", "b"], out="data/thesis.tex")
    (tmp_path / "empty").mkdir()
    make(tmp_path, ["a", "b"], out="empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "empty"]


def test_failure_in_the_middle_leaves_the_old_data(tmp_path, monkeypatch):
    monkeypatch.setattr(prep, "_BATCH_CHARS", 1)
    make(tmp_path, ["a", "b"])

    def documents():
        yield Document(None, "#0", "x")
        raise UserError("line 2 is broken")

    broken = Source("local", "broken", "", "", "", documents)
    with pytest.raises(UserError, match="line 2 is broken"):
        prepare(broken, tmp_path / "data", BYTES, progress=False, force=True)
    assert sorted(sum(split_of(tmp_path / "data"), [])) == ["a", "b"]
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_disk_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the prepared data to .*: .*--out"):
        make(tmp_path, ["a", "b"], out="file/data")


# Processes


def run_script(*args, cwd, **kwargs):
    command = [sys.executable, str(REPO / "scripts" / "prepare_data.py"), *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, **kwargs)


def test_script(tmp_path):
    lines = "".join(json.dumps({"words": t}) + "\n" for t in TEXTS)
    (tmp_path / "acts.jsonl").write_text(lines)
    args = ("--input", "acts.jsonl", "--tokenizer", "bytes", "--text_field", "words")
    done = run_script(*args, cwd=tmp_path)
    assert (done.returncode, done.stderr[:10]) == (0, "tokenizing")
    assert "200 documents" in done.stderr and "190 documents" in done.stdout
    assert split_of(tmp_path / "data" / "bytes")[1]
    again = run_script(*args, cwd=tmp_path)
    assert again.returncode == 2 and again.stdout == ""
    assert again.stderr.startswith("error: the output directory") and again.stderr.count("\n") == 1
    assert run_script(*args[:-2], "--out", "x", cwd=tmp_path).stderr.startswith("error: acts.jsonl:1 has no field")


@pytest.mark.parametrize("how, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_killed_preparation_leaves_nothing_that_looks_finished(tmp_path, how, code):
    with open(tmp_path / "acts.jsonl", "w") as file:  # seconds of work
        file.writelines([json.dumps({"text": TEXTS[0]}) + "\n"] * 1_000_000)
    command = [
        sys.executable,
        str(REPO / "scripts" / "prepare_data.py"),
        "--input",
        "acts.jsonl",
        "--tokenizer",
        "bytes",
        "--out",
        "out/data",
    ]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    child = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not list((tmp_path / "out").glob(".data.*/new/all.bin")):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)
    child.send_signal(how)
    child.communicate(timeout=30)
    assert child.returncode == code
    assert not prep.has_tokens(tmp_path / "out" / "data")
    left = list((tmp_path / "out").iterdir())
    assert len(left) == 2 * (how == signal.SIGKILL)  # a hidden folder and a lock, which ended with its process
    make(tmp_path / "out", TEXTS)  # and the next one cleans up
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["data"]


# resolve


@pytest.fixture
def corpora(monkeypatch):
    """Stand-ins for the named sources; ``reach`` says which can be had."""
    reach = {"eurlex57k", "lex_glue", "sample"}
    asked = []

    def get_source(name, **kwargs):
        asked.append(name)

        def documents():
            if name not in reach:
                raise SourceUnavailable(f"{name} cannot be reached")
            return iter([Document(None, str(i), f"{name} {i}") for i in range(40)])

        return Source(name, name, "CC0", "", "", documents)

    monkeypatch.setattr(sources, "get_source", get_source)
    return reach, asked


def find(tmp_path, data_source, tokenizer="bytes", **kwargs):
    return resolve(tmp_path / "data", data_source, tokenizer, progress=False, **kwargs)


def test_auto_takes_the_corpus_and_then_what_is_there(tmp_path, corpora):
    _, asked = corpora
    first = find(tmp_path, "auto")
    assert (first.meta["source"], first.is_sample, first.warnings) == ("eurlex57k", False, ())
    assert find(tmp_path, "auto") == find(tmp_path, "prepared") == find(tmp_path, "eurlex57k") == first
    assert asked == ["eurlex57k"]


def test_auto_falls_back_to_the_sample_with_a_warning(tmp_path, corpora):
    corpora[0].remove("eurlex57k")
    data = find(tmp_path, "auto")
    assert data.is_sample and data.meta["source"] == "sample"
    assert "eurlex57k cannot be reached" in data.warnings[0] and "SMALL SAMPLE" in data.warnings[1]
    assert "SMALL SAMPLE" in prep.banner(data.warnings)
    again = find(tmp_path, "auto")  # and it goes on warning
    assert again.is_sample and "SMALL SAMPLE" in again.warnings[0]


def test_force_never_replaces_data_by_the_sample(tmp_path, corpora):
    make(tmp_path, TEXTS)
    corpora[0].remove("eurlex57k")
    with pytest.raises(SourceUnavailable):
        prepare_source("auto", tmp_path / "data", BYTES, progress=False, force=True)
    assert find(tmp_path, "auto").meta["source"] == "local"


def test_auto_with_nothing_to_be_had(tmp_path, corpora):
    corpora[0].clear()
    with pytest.raises(UserError, match="no training data: eurlex57k cannot .*; and .* sample cannot be reached"):
        find(tmp_path, "auto")
    assert list(tmp_path.iterdir()) == []


def test_auto_does_not_hide_a_bad_checksum(tmp_path, corpora, monkeypatch):
    def documents():
        raise UserError("has sha256 x where y is expected")

    stand_in = sources.get_source
    bad = Source("eurlex57k", "", "", "", "", documents)
    monkeypatch.setattr(sources, "get_source", lambda name, **kw: bad if name == bad.name else stand_in(name))
    with pytest.raises(UserError, match="sha256 x where y"):
        find(tmp_path, "auto")


def test_a_second_run_waits_for_the_first_and_takes_its_data(tmp_path, corpora, monkeypatch):
    waiting = threading.Event()
    make(tmp_path, TEXTS, out="elsewhere/data")
    monkeypatch.setattr(files, "print", lambda *words, **how: waiting.set(), raising=False)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with files.locked(tmp_path / ".data.lock", "data"):
            second = pool.submit(find, tmp_path, "auto")
            assert waiting.wait(30) and not second.done()
            os.rename(tmp_path / "elsewhere" / "data", tmp_path / "data")  # the first one finishes
        assert second.result(30).meta["source"] == "local"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number", sorted(NO_LOCKS))
def test_without_locks_it_says_so_and_goes_on(tmp_path, monkeypatch, capsys, number):
    def acquire(lock, **how):
        raise OSError(number, "no locks")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    make(tmp_path, TEXTS)
    with locked(tmp_path / "run"):
        pass
    notes = capsys.readouterr().err.splitlines()
    assert [line.partition(" has no locks: keep other processes away")[0] for line in notes] == [
        f"note: the file system of {tmp_path / name}" for name in ("data", "run")
    ]


def test_a_lock_that_fails_otherwise_ends_it(tmp_path, monkeypatch):
    def acquire(lock, **how):
        raise OSError(errno.EIO, "Input/output error", lock.lock_file)

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.raises(UserError, match="cannot write the prepared data"):
        make(tmp_path, TEXTS)


def test_explicit_source_is_never_replaced(tmp_path, corpora):
    corpora[0].remove("eurlex57k")
    with pytest.raises(SourceUnavailable):
        find(tmp_path, "eurlex57k")
    find(tmp_path, "sample")
    for kwargs, message in [
        ({"data_source": "eurlex57k"}, "has source 'sample' but 'eurlex57k' is asked for"),
        ({"data_source": "auto", "tokenizer": "gpt2"}, "has tokenizer 'bytes' but 'gpt2' is asked for"),
    ]:
        with pytest.raises(UserError, match=message):
            find(tmp_path, **kwargs)
    assert find(tmp_path, "sample").is_sample


def test_prepared_must_be_there_and_complete(tmp_path):
    with pytest.raises(UserError, match="holds no train.bin and val.bin; run scripts/prepare_data.py"):
        find(tmp_path, "prepared")
    make(tmp_path, TEXTS)
    (tmp_path / "data" / "val.bin").unlink()
    with pytest.raises(UserError, match="has no val.bin"):
        find(tmp_path, "auto")


def test_nanogpt_files_count_as_prepared(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train.bin", "val.bin"):
        np.arange(100, dtype="<u2").tofile(tmp_path / "data" / name)
    for data_source in ("auto", "prepared"):
        data = find(tmp_path, data_source, tokenizer="gpt2")
        assert data.meta["source"] == "unknown" and data.meta["tokenizer"] is None
    with pytest.raises(UserError, match="has source 'unknown' but 'sample'"):
        find(tmp_path, "sample")


def test_unknown_data_source(tmp_path):
    with pytest.raises(UserError, match="data_source is 'pile'; it must be one of 'auto', 'prepared'"):
        find(tmp_path, "pile")


def test_default_directory_follows_the_tokenizer(tmp_path, monkeypatch, corpora):
    monkeypatch.chdir(tmp_path)
    assert resolve(None, "auto", "bytes", progress=False).dir == Path("data/bytes")
    assert prep.has_tokens(tmp_path / "data" / "bytes")


def test_text_field_is_for_local_documents(tmp_path):
    with pytest.raises(UserError, match="text_field is 'body' but the source is 'sample'"):
        prepare_source("sample", tmp_path / "data", BYTES, text_field="body")
