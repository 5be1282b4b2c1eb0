"""Sound files of other people's tools: read as they are meant, or refused by name. Tests draw several instances."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from altgrad_jax.data import sources, tokenizer
from altgrad_jax.data.dataset import load_token_data, open_token_file
from altgrad_jax.data.prepare import prepare_source, summary
from altgrad_jax.data.sources import local
from altgrad_jax.data.tokenizer import get_tokenizer
from altgrad_jax.errors import UserError

drawn = settings(max_examples=25, deadline=None, database=None, derandomize=True,
                 phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
SENTENCES = st.lists(
    st.sampled_from(["The Council shall adopt the budget. ", "Ευρωπαϊκή Ένωση, ἄρθρον 5. ", "Règlement (UE) n° 12: ",
                     "欧州連合の規則 🇪🇺 ", "whereas 1,743 tonnes\n\twere landed; "]),
    min_size=60, max_size=60,
).map("".join)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return lambda: Path(shutil.rmtree(tmp_path / "x", ignore_errors=True) or tmp_path / "x")


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# Token files

RNG = np.random.default_rng
TYPES = ("<u4", "<i4", "<i8", "<u8", ">u2", ">u4", ">i8", "<f4", "<f8")


def numpy_file(ids):
    file = io.BytesIO()
    np.save(file, ids.astype(np.uint16))
    return file.getvalue()


def llmc(ids, magic=20240520):
    return np.array([magic, 1, len(ids)] + [0] * 253, "<i4").tobytes() + ids.astype("<u2").tobytes()


def characters(ids, text=None):
    alphabet = {c: i for i, c in enumerate(sorted(set(text)))}
    return np.array([alphabet[c] for c in text], "<u2").tobytes()


WRITERS = {
    **{name: lambda ids, name=name: ids.astype(name).tobytes() for name in TYPES},
    "np.save": numpy_file,
    "llm.c": llmc,
    "llm.c, llama": lambda ids: llmc(ids, 20240801),
    "another vocabulary": lambda ids: (
        np.random.default_rng(0).permutation(int(ids.max()) + 1)[ids].astype("<u2").tobytes()
    ),
    "random": lambda ids: np.random.default_rng(0).integers(0, int(ids.max()) + 1, len(ids)).astype("<u2").tobytes(),
    "gzip": lambda ids: gzip.compress(ids.astype("<u2").tobytes()),
    "pickle": lambda ids: pickle.dumps(ids.tolist()),
}


@drawn
@given(
    text=SENTENCES,
    name=st.sampled_from(["gpt2", "bytes"]),
    how=st.sampled_from(sorted(WRITERS) + ["characters", "text"]),
)
def test_token_files_of_another_convention(folder, text, name, how):
    """Read as the same tokens, or refused; never believed. And nanoGPT's own convention is."""
    tok, where = get_tokenizer(name), folder()
    ids = np.concatenate([np.append(tok.encode(part), tok.eot) for part in (text, text[:900])])
    sizes = dict(vocab_size=50304, block_size=16)
    for split in ("train.bin", "val.bin"):
        put(where / split, ids.astype("<u2").tobytes())
    right = load_token_data(where, tokenizer=name, **sizes)
    assert right.train_T.tolist() == ids.tolist()
    other = {"text": lambda ids: text, "characters": lambda ids: characters(ids, text)}.get(how) or WRITERS[how]
    for split in ("train.bin", "val.bin"):
        put(where / split, other(ids))
    if how in ("<u4", "<i4"):
        read = load_token_data(where, tokenizer=name, **sizes)
        assert read.train_T.tolist() == ids.tolist() and read.fingerprint == right.fingerprint
        assert open_token_file(where / "val.bin", tokenizer=name, **sizes).tolist() == ids.tolist()
        assert read.meta["n_tokens"] == {"train": len(ids), "val": len(ids)}
        return
    for read in (
        lambda: load_token_data(where, tokenizer=name, **sizes),
        lambda: open_token_file(where / "val.bin", tokenizer=name, **sizes),
    ):
        with pytest.raises(
            UserError, match=r"(train|val)\.bin (seems to|holds numbers that are no text|has [\d,]+ bytes)"
        ):
            read()


@pytest.mark.parametrize("dtype", [">u2", "<i8", "np.save", "llm.c"])
def test_the_command_in_the_sentence_converts_the_file(tmp_path, dtype):
    tok = get_tokenizer("gpt2")
    ids = tok.encode("The Commission shall publish the list of products in the Official Journal. " * 40)
    path = put(tmp_path / "val.bin", WRITERS[dtype](ids))
    with pytest.raises(UserError, match="convert it") as e:
        open_token_file(path, vocab_size=50257, block_size=8, tokenizer="gpt2")
    code = str(e.value).split('python -c "')[1].rstrip('"')
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        exec(code, {})
    finally:
        os.chdir(here)
    read = open_token_file(tmp_path / "new-val.bin", vocab_size=50257, block_size=8, tokenizer="gpt2")
    assert read.tolist() == ids.tolist()


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_meta_pkl_is_never_opened(tmp_path, name):
    ids = get_tokenizer(name).encode("The Council shall decide. " * 40)
    for split in ("train.bin", "val.bin"):
        put(tmp_path / split, ids.astype("<u2").tobytes())
    put(tmp_path / "meta.pkl", b"cos\nmkdir\n(S'" + str(tmp_path / "executed").encode() + b"'\ntR.")
    with pytest.raises(UserError, match="meta.pkl beside it, .* characters; prepare the text itself"):
        load_token_data(tmp_path, vocab_size=50257, block_size=8, tokenizer=name)
    assert not (tmp_path / "executed").exists()


# Splits

WORDS = {
    "train": ["train", "training", "Train", "trainset"],
    "validation": ["validation", "valid", "val", "dev", "VAL", "devset"],
    "test": ["test", "testing", "eval", "evaluation", "TEST", "testset", "devtest"],
}
PLACES = ["{}.jsonl", "{}-00000-of-00001.jsonl", "{}-00000-of-00002-0123456789abcdef.jsonl", "my {}.jsonl",
          "data/{}-00000-of-00001.jsonl", "acts_{}.jsonl", "acts.{}.txt", "{}/part.jsonl", "en/{}/deep/0.txt",
          "{}_clean/a.jsonl", "v1.0/acts-{}.jsonl.gz", "acts/{}/part-0.json"]  # fmt: skip


@drawn
@given(
    place=st.sampled_from(PLACES),
    splits=st.sets(st.sampled_from(sorted(WORDS)), min_size=1),
    word=st.fixed_dictionaries({split: st.sampled_from(words) for split, words in WORDS.items()}),
)
def test_splits_by_the_names_in_use(folder, place, splits, word):
    where = folder()
    for split in splits:
        path = where / place.format(word[split])
        rows = [f"{split} {i}" for i in range(3)]
        if ".txt" in path.name:
            for i, text in enumerate(rows):
                put(path.with_name(path.name.replace(".txt", f".{i}.txt")), text)
        else:
            data = "".join(json.dumps({"text": text}) + "\n" for text in rows).encode()
            put(path, gzip.compress(data) if path.suffix == ".gz" else data)
    if "train" not in splits:
        with pytest.raises(UserError, match="none of the training split.*--nosplit_names"):
            local(where)
        assert len(list(local(where, split_names=False).documents())) == 3 * len(splits)
        return
    source = local(where)
    found = [(d.split, d.text.split()[0]) for d in source.documents()]
    own = "validation" in splits
    expected = [("train" if own else None, "train")] * 3 + [("validation", "validation")] * 3 * own
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert bool(source.left_out) == ("test" in splits)
    put(where / "notes.txt", "of which split?")
    with pytest.raises(UserError, match="'notes.txt', whose split is not known.*--nosplit_names"):
        local(where)


@pytest.mark.parametrize("name", ["train/test.jsonl", "train_test.jsonl", "test-dev/a.txt", "valTrain.json"])
def test_a_name_of_two_splits_is_refused(tmp_path, name):
    put(tmp_path / name, '{"text": "x"}\n')
    with pytest.raises(UserError, match="is named after two splits"):
        local(tmp_path)


@pytest.mark.parametrize("n", [1, 2])
def test_a_text_in_both_splits_is_said(tmp_path, n):
    texts = {"train": ["a b", "c", "e"], "dev": ["d", *("c", "a b ")[:n]]}
    for split, rows in texts.items():
        put(tmp_path / "in" / f"{split}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in rows))
    data = prepare_source(tmp_path / "in", tmp_path / "out", get_tokenizer("bytes"), progress=False)
    assert f"{n} of the {1 + n} validation documents have the same text" in data.warnings[0]
    assert f"{n} validation documents are training documents too" in summary(data.dir, data.meta)


# Files of a folder


def table(rows):
    return pa.Table.from_pylist([{"id": i, **row} for i, row in enumerate(rows)])


def parquet(rows):
    file = io.BytesIO()
    pq.write_table(table(rows), file)
    return file.getvalue()


def arrow(rows, new):
    file = io.BytesIO()
    with new(file, table(rows).schema) as writer:
        writer.write_table(table(rows))
    return file.getvalue()


def separated(rows, delimiter):
    file = io.StringIO()
    writer = csv.DictWriter(file, ["id", *rows[0]], delimiter=delimiter)
    writer.writeheader()
    writer.writerows({"id": i, **row} for i, row in enumerate(rows))
    return file.getvalue()


def lines(rows, **how):
    return "".join(json.dumps(row, **how) + "\n" for row in rows)


READ = {
    "a.jsonl": lines, "b.json.gz": lambda rows: gzip.compress(lines(rows).encode()), "c.JSONL": lines,
    "d.json": json.dumps,
    "e.json": lines, "f.ndjson": lines, "g.jsonlines": lines, "h.jl": lines, "i.csv": lambda rows: separated(rows, ","),
    "j.csv": lambda rows: separated(rows, ";"), "k.tsv": lambda rows: separated(rows, "\t"), "l.parquet": parquet,
    "m.arrow": lambda rows: arrow(rows, pa.ipc.new_stream), "n.arrow": lambda rows: arrow(rows, pa.ipc.new_file),
    "o.jsonl.bz2": lambda rows: bz2.compress(lines(rows).encode()),
    "p.jsonl.xz": lambda rows: lzma.compress(lines(rows).encode()),
    "q.CSV.GZ": lambda rows: gzip.compress(separated(rows, ",").encode()),
    "r.json.zst": lambda rows: pa.compress(lines(rows).encode(), "zstd", asbytes=True),
    "s.json.xz": lambda rows: lzma.compress(json.dumps(rows).encode()),
}  # fmt: skip
FIELDS = ["text", "content", "Text", "body", "document", "article", "raw_content", "passage"]
SKIPPED = ["README.md", "dataset_info.json", "state.json", "a.pdf", "b.parquet.gz", "c.pkl", "notes.docx",
           ".hidden/a.jsonl", ".DS_Store", "LICENSE"]  # fmt: skip


@drawn
@given(
    names=st.sets(st.sampled_from(sorted(READ)), min_size=1),
    skipped=st.sets(st.sampled_from(SKIPPED)),
    field=st.sampled_from(FIELDS),
    texts=st.lists(st.sampled_from(['Act 1, "x"; y\tz', "two\nlines", "ü 欧"]), min_size=2, max_size=4),
)
def test_every_file_is_read_or_named(folder, names, skipped, field, texts):
    where = folder()
    for name in names:
        put(where / name, READ[name]([{field: f"{name} {text}"} for text in texts]))
    for name in skipped:
        put(where / name, b"\x89binary")
    source = local(where)
    assert [d.text for d in source.documents()] == [f"{name} {text}" for name in sorted(names) for text in texts]
    assert sorted(source.skipped) == sorted({name.split("/")[0] for name in skipped})
    shown = summary(
        "out", {"source": "x", "tokenizer": "x", "licence": "x", "n_tokens": {"train": 1, "val": 1}}, source.skipped
    )
    assert all(name in shown for name in source.skipped)


@pytest.mark.parametrize("record", [{"body": "x", "article": "y"}, {"words": "x"}, {"messages": ["x"]}])
def test_a_record_without_one_clear_text_is_refused(tmp_path, record):
    path = put(tmp_path / "a.jsonl", json.dumps(record))
    with pytest.raises(UserError, match="a.jsonl:1 has no field 'text'.*--text_field"):
        list(local(path).documents())


@pytest.mark.parametrize("rows, message", [
    ('text,id\n"x",1\ny\n', "a.csv:3 has 1 fields where the header has 2"),
    ('text,id\n"x,1\n', "a.csv:.* is not CSV that can be read"),
    ("a,b\n1,2\n", "a.csv:2 has no field 'text'.*its fields are 'a', 'b'"),
])  # fmt: skip
def test_csv_that_is_wrong(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        list(local(put(tmp_path / "a.csv", rows)).documents())


def test_links_are_followed_and_cycles_end(tmp_path):
    for name, text in (("elsewhere/part.jsonl", "train"), ("in/dev/part.jsonl", "dev")):
        put(tmp_path / name, lines([{"text": text}]))
    (tmp_path / "in/train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/dev/root").symlink_to(tmp_path / "in")
    source = local(tmp_path / "in")
    assert [(d.split, d.text) for d in source.documents()] == [("validation", "dev"), ("train", "train")]
    assert source.skipped == ("dev/root", "train/up")
    (tmp_path / "in/train2").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="train/part.jsonl and .*train2/part.jsonl are one file"):
        local(tmp_path / "in")


# Text

ALPHABETS = ["The Council shall decide. ", "Совет принимает решение. ", "Το Συμβούλιο αποφασίζει. ",
             "परिषद निर्णय लेगी। ", "Règlement délégué. "]  # fmt: skip


@drawn
@given(
    text=st.sampled_from(ALPHABETS),
    encoding=st.sampled_from(["utf-16-le", "utf-16-be", "utf-16", "utf-32-le", "utf-32-be"]),
    kind=st.sampled_from(["txt", "csv", "jsonl", "json"]),
)
def test_text_in_another_encoding_is_refused(folder, text, encoding, kind):
    rows = [{"text": text}] * 40
    written = {"txt": text * 40, "csv": separated(rows, ","), "json": json.dumps(rows, ensure_ascii=False),
               "jsonl": lines(rows, ensure_ascii=False)}  # fmt: skip
    path = put(folder() / f"a.{kind}", written[kind].encode(encoding))
    with pytest.raises(UserError, match="a.(txt|csv|json)") as e:
        list(local(path).documents())
    name = {"utf-16": "UTF-16LE"}.get(encoding, encoding.upper().replace("-LE", "LE").replace("-BE", "BE"))
    assert f"it seems to be {name}: convert it with iconv -f {name} -t UTF-8" in str(e.value)


def test_nul_filled_text_of_a_record_is_refused_and_a_single_one_is_not(tmp_path):
    spaced = "".join(c + "\0" for c in "The Council")
    with pytest.raises(UserError, match="a.jsonl:1 is full of NUL characters"):
        list(local(put(tmp_path / "a.jsonl", lines([{"text": spaced}]))).documents())
    assert [d.text for d in local(put(tmp_path / "b.jsonl", lines([{"text": "x" * 99 + "\0"}]))).documents()]


def test_a_million_blanks_are_refused_by_name(tmp_path):
    path = put(tmp_path / "a.jsonl", lines([{"text": "The Council"}, {"text": "Annex" + " " * 1_200_000 + "end"}]))
    with pytest.raises(UserError, match="a.jsonl:2 cannot be tokenized with 'gpt2'"):
        prepare_source(path, tmp_path / "out", get_tokenizer("gpt2"), progress=False)


def test_a_document_that_cannot_be_tokenized_is_named(tmp_path):
    def broken(text):
        if "bad" in text:
            raise ValueError("Regex error")
        return np.zeros(3, np.uint16)

    tok = tokenizer.Tokenizer("broken", 256, 255, broken, str)
    path = put(tmp_path / "a.jsonl", lines([{"text": t} for t in ("good", "bad", "good")]))
    with pytest.raises(UserError, match=r"a.jsonl:2 cannot be tokenized with 'broken' \(Regex error\)"):
        prepare_source(path, tmp_path / "out", tok, progress=False)


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_one_txt_is_cut_by_position(tmp_path, in_folder, pack):
    text = "The Council shall decide. " * 100
    path = put(tmp_path / "in" / f"input.txt{'.gz' * (pack is not bytes)}", pack(text.encode()))
    data = prepare_source(path.parent if in_folder else path, tmp_path / "out", get_tokenizer("bytes"), progress=False)
    train, val = (np.fromfile(data.dir / f"{name}.bin", "<u2").astype(np.uint8).tobytes() for name in ("train", "val"))
    assert train + val == text.encode() + b"\xff" and len(val) == round(0.05 * (len(text) + 1))
    assert (data.meta["split"], data.meta["val_fraction"]) == ("position", 0.05)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_separator_lines_of_a_txt(tmp_path, newline):
    text = newline.join(["one <|endoftext|> inside", "<|endoftext|>", "two", "<|endoftext|>"])
    found = [d.text.strip() for d in local(put(tmp_path / "a.txt", text)).documents()]
    assert found == ["one <|endoftext|> inside", "two", ""]


# A tokenizer of one's own


def own_tokenizer(kind, path, separator="<|endoftext|>", vocab_size=400):
    models, trainers = tokenizers.models, tokenizers.trainers
    special = [separator] if separator else []
    text = ["The Council shall adopt the budget of 2003, and so on. " * 3, "Whereas fish were landed in Ünïon ports; "]
    if kind == "bpe":
        tok = tokenizers.Tokenizer(models.BPE())
        tok.pre_tokenizer, tok.decoder = tokenizers.pre_tokenizers.ByteLevel(False), tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "unigram":
        tok = tokenizers.Tokenizer(models.Unigram())
        tok.pre_tokenizer, tok.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=80, special_tokens=[*special, "<unk>"], unk_token="<unk>", show_progress=False
        )
    else:
        tok = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
        tok.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=80, special_tokens=[*special, "[UNK]"], show_progress=False)
    tok.train_from_iterator(text, trainer)
    tok.enable_truncation(4)  # files of the hub often have it; a document is not cut
    tok.save(str(path))
    return str(path)


OWN = [("bpe", "<|endoftext|>"), ("bpe", "</s>"), ("unigram", "</s>"), ("words", "[SEP]")]


@pytest.mark.parametrize("kind, separator", OWN)
def test_own_tokenizer_from_text_to_windows(tmp_path, kind, separator):
    name = own_tokenizer(kind, tmp_path / "tokenizer.json", separator)
    tok = get_tokenizer(name)
    theirs = tokenizers.Tokenizer.from_file(name)
    assert tok.eot == theirs.token_to_id(separator) and tok.vocab_size == theirs.get_vocab_size()
    theirs.no_truncation()
    text = "The Council shall adopt the budget. "
    assert tok.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids
    assert tok.eot not in tok.encode(f"The Council {separator} shall")  # no text is special
    path = put(tmp_path / "a.jsonl", lines([{"text": text * (i + 1)} for i in range(40)]))
    data = prepare_source(path, tmp_path / "out", tok, progress=False)
    read = load_token_data(data.dir, vocab_size=tok.vocab_size, block_size=8, tokenizer=name)
    assert read.meta["tokenizer"] == tok.name and read.fingerprint
    with pytest.raises(UserError, match=f"made by the tokenizer '{tok.name}' but 'bytes'"):
        load_token_data(data.dir, vocab_size=tok.vocab_size, block_size=8, tokenizer="bytes")
    os.remove(data.dir / "meta.json")  # and without it, by what the files hold
    load_token_data(data.dir, vocab_size=tok.vocab_size, block_size=8, tokenizer=name)


def test_own_tokenizers_that_cannot_be_used(tmp_path):
    put(tmp_path / "big.json", json.dumps({"model": {"vocab": {"x": 128255}}}))
    put(tmp_path / "other.json", json.dumps({"model": "gpt"}))
    put(tmp_path / "odd.json", json.dumps({"model": {"vocab": {"x": 1}}}))
    for name, message in [
        (own_tokenizer("bpe", tmp_path / "none.json", None), "none of the tokens .* to separate documents"),
        (str(tmp_path / "big.json"), "has 128,256 token ids, and token files hold at most 65,536"),
        (str(tmp_path / "other.json"), "holds no vocabulary of a tokenizer"),
        (str(tmp_path / "odd.json"), "is no tokenizer that can be read"),
        (str(tmp_path / "nowhere.json"), "nowhere.json is missing"),
    ]:
        with pytest.raises(UserError, match=message):
            get_tokenizer(name)


# The environment


def test_a_user_without_a_home(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)  # without an entry in the passwd database
    assert sources.default_cache_dir() == tmp_path / ".cache" / "altgrad_jax"


@pytest.mark.parametrize("prompt", ["", "<|endoftext|>", "a<|endoftext|>b", "<|endoftext|><|endoftext|>", "Article 1"])
@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_the_separator_in_a_prompt(prompt, name):
    tok = get_tokenizer(name)
    ids = tok.encode_prompt(prompt)
    assert tok.decode(ids) == (prompt or "<|endoftext|>")
    assert (ids == tok.eot).sum() == max(prompt.count("<|endoftext|>"), not prompt)
