"""The catalogue of bad files, folders, archives, downloads, records, flags and command lines; see inputs.

Whatever must first be right to be made wrong (token files, a checkpoint, a run folder, a Hugging Face folder) is made
once, tiny, and copied into the folder of each case.
"""

import contextlib
import ctypes
import functools
import gzip
import http.server
import json
import math
import os
import runpy
import shutil
import socket
import sqlite3
import struct
import sys
import threading
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np

from altgrad_jax import cli
from altgrad_jax import config as settings
from altgrad_jax.data import dataset, documents, prepare, sources, tokenizer
from campaigns.case import ROOT, Case, Script

TINY = dict(
    tokenizer="bytes",
    vocab_size=256,
    n_layer=1,
    n_head=1,
    n_embd=8,
    block_size=8,
    batch_size=2,
    max_steps=4,
    warmup_steps=1,
    eval_windows=2,
    eval_batch_size=2,
    checkpoint_interval=2,
    eval_interval=2,
    wandb_mode="disabled",
    console="quiet",
    data_source="prepared",
    run_name="tiny",
)
CONFIG = f"--config={ROOT / 'configs' / 'smoke.py'}"
# Whoever opens it as a pickle makes a folder, which the listing of the working folder shows.
PICKLE = b"cos\nmkdir\n(S'executed'\ntR."
LINE = b'{"text": "Article 1. Subject matter."}\n'


def tiny(**changes):
    config = settings.default_config()
    config.update({**TINY, **changes})
    return config


def write(path, content=b""):
    """A file of bytes, text or a JSON value, its folders included; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes | str):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


@contextlib.contextmanager
def without_override():
    """A thread that has root's rights obeys file permissions like everyone else, so that read-only means read-only."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    libc.capget(header, data)
    effective, *rest = struct.unpack("6I", data.raw)
    override = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    libc.capset(header, struct.pack("6I", effective & ~override, *rest))
    try:
        yield
    finally:
        libc.capset(header, struct.pack("6I", effective, *rest))


class Originals:
    """What is right, made below `folder` when it is first asked for."""

    def __init__(self, folder):
        self.dir = folder

    @functools.cached_property
    def tokens(self):
        """Prepared token files of the bytes tokenizer: 12 documents."""
        source = self.dir / "text"
        for i in range(12):
            write(source / f"{i}.txt", f"Article {i}. The Council shall adopt regulation {i * i}. " * 6)
        out = self.dir / "tokens"
        prepare.prepare(sources.local(source), out, tokenizer.get_tokenizer("bytes"), progress=False)
        return out

    @functools.cached_property
    def run(self):
        """A run folder: manifest, record and one checkpoint, of step 2, which holds parameters only."""
        import jax

        from altgrad_jax.models.gpt2 import GPTConfig
        from altgrad_jax.models.model import init_params
        from altgrad_jax.run.checkpoint import open_checkpoints
        from altgrad_jax.run.record import Record, write_manifest

        folder, config = self.dir / "run", tiny()
        meta = prepare.read_meta(self.tokens)
        data = dataset.load_token_data(self.tokens, vocab_size=256, block_size=8)
        write_manifest(
            folder,
            {
                "run_id": "a1b2c3d4",
                "config": settings.to_dict(config),
                "tags": [],
                "model": {"parameters": 1000},
                "data": {"fingerprint": data.fingerprint, "dir": str(self.tokens), "meta": meta},
                "starts": [{"device": {"kind": "cpu"}, "step": 0}],
            },
        )
        record = Record.open(folder)
        record.write(
            [{"step": 0, "val_loss": 5.5}, {"step": 1, "loss": 5.5}, {"step": 2, "loss": 5.4, "val_loss": 5.4}]
        )
        record.close()
        checkpoints = open_checkpoints(folder, max_checkpoints=3)
        with jax.default_device(jax.devices("cpu")[0]):
            params = init_params(GPTConfig(1, 1, 8, 8, 256), 0)
            checkpoints.save(
                2,
                {"params": params},
                {"config": settings.to_dict(config), "run_id": "a1b2c3d4", "data_fingerprint": data.fingerprint},
            )
            checkpoints.close()
        assert not checkpoints.check()[0].error
        return folder

    @functools.cached_property
    def hf(self):
        """A Hugging Face folder of that model."""
        from altgrad_jax.inference.generate import load_model
        from altgrad_jax.models import hf

        params, config, *_ = load_model(self.run)
        hf.write_folder(self.dir / "hf", *hf.to_hf(params, config))
        return self.dir / "hf"

    @functools.cached_property
    def wheel(self):
        """A file like the sample's wheel."""
        path = self.dir / "sample.whl"
        with contextlib.closing(sqlite3.connect(self.dir / "regulations.db")) as connection:
            connection.execute("CREATE TABLE articles (celex TEXT, article_number TEXT, content TEXT)")
            connection.commit()
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(self.dir / "regulations.db", sources.SAMPLE_DB)
        return path


def changed(original, where, change):
    """A copy of a folder or file at `where`, with `change` applied to it; returns where."""
    (shutil.copytree if original.is_dir() else shutil.copyfile)(original, where)
    change(where)
    return where


def remove(name):
    return lambda folder: (shutil.rmtree if (folder / name).is_dir() else os.remove)(folder / name)


def put(name, content):
    return lambda folder: write(folder / name, content)


def edit(name, change):
    """A change of a JSON file: `change` is given its value, and returns the new one or changes it in place."""

    def apply(folder):
        value = json.loads((folder / name).read_bytes())
        got = change(value)
        write(folder / name, value if got is None else got)

    return apply


def without(name, *keys):
    """A change of a JSON file: the value at the path of keys is taken out."""

    def take(value):
        for key in keys[:-1]:
            value = value[key]
        del value[keys[-1]]

    return edit(name, take)


def with_value(name, new, *keys):
    """A change of a JSON file: the value at the path of keys is replaced."""

    def replace(value):
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = new

    return edit(name, replace)


def cut(name, share):
    def apply(folder):
        path = folder / name
        os.truncate(path, int(path.stat().st_size * share))

    return apply


def flip(name, at=0.5):
    def apply(folder):
        data = bytearray((folder / name).read_bytes())
        data[int(at * (len(data) - 1))] ^= 0x41
        (folder / name).write_bytes(data)

    return apply


def instead(name, kind):
    """A change: something that is no file in the place of a file."""

    def apply(folder):
        path = folder / name
        if path.exists():
            path.unlink()
        {
            "folder": path.mkdir,
            "fifo": lambda: os.mkfifo(path),
            "broken link": lambda: path.symlink_to("nowhere"),
            "endless device": lambda: path.symlink_to("/dev/zero"),
            "link to itself": lambda: path.symlink_to(path.name),
        }[kind]()

    return apply


NOT_JSON = {
    "empty": b"",
    "cut": b'{"a": ',
    "not UTF-8": b'{"a": "\xff"}',
    "a pickle": PICKLE,
    "a list": b"[]",
    "null": b"null",
    "nested too deeply": b"[" * 100_000,
    "NUL bytes": b"\0" * 64,
    "UTF-16": '{"a": 1}'.encode("utf-16-be"),
    "a number of 5000 digits": b"1" * 5000,
    "two values": b"{} {}",
}
NO_FILES = ("folder", "fifo", "broken link", "endless device", "link to itself")


# ------------------------------------------------------------------------------------------------------ token files


def token_files(originals):
    kind = "token files"

    def case(what, change, *names, **options):
        def make(folder):
            where = changed(originals.tokens, folder / "tokens", change)
            return lambda: dataset.load_token_data(
                where, **{"vocab_size": 256, "block_size": 8, "tokenizer": "bytes", **options}
            )

        return Case(kind, what, make, names)

    for name in ("train.bin", "val.bin"):
        yield case(f"{name} missing", remove(name), name)
        yield case(f"{name} empty", put(name, b""), name, "0 tokens")
        yield case(f"{name} of an odd number of bytes", put(name, b"\0" * 1001), name, "1,001")
        yield case(f"{name} one token short of a window", put(name, b"\0" * 16), name, "8 tokens")
        yield case(f"{name} of one byte", put(name, b"\0"), name, "1 bytes")
        yield case(
            f"{name} cut to half",
            lambda folder, name=name: os.truncate(folder / name, (folder / name).stat().st_size // 4 * 2),
            name,
        )
        yield case(f"{name} with one byte flipped", flip(name), name, "sha256")
        yield case(
            f"{name} with more tokens than were prepared",
            lambda folder, name=name: write(folder / name, (folder / name).read_bytes() * 2),
            name,
        )
        yield case(f"{name} exchanged for noise", put(name, bytes(range(256)) * 8), name)
        yield case(f"{name} a pickle", put(name, PICKLE * 50), name)
        for no_file in NO_FILES:
            yield case(f"{name}: {no_file}", instead(name, no_file), name)

    def array_file(folder):
        np.save(folder / "train.npy", np.zeros(1000, np.uint16))
        os.replace(folder / "train.npy", folder / "train.bin")

    yield case("train.bin a NumPy file", array_file, "train.bin")
    yield case("a token >= vocab_size", lambda folder: None, "vocab_size is 100", vocab_size=100)
    yield case("a window longer than the data", lambda folder: None, "block_size", block_size=2**20)
    yield case("another tokenizer", lambda folder: None, "'bytes'", "'gpt2'", tokenizer="gpt2")
    for what, content in NOT_JSON.items():
        yield case(f"meta.json {what}", put("meta.json", content), "meta.json")
    for no_file in NO_FILES:
        yield case(f"meta.json: {no_file}", instead("meta.json", no_file), "meta.json")
    for key in ("schema_version", "source", "licence", "tokenizer", "n_tokens", "sha256"):
        yield case(f"meta.json without {key}", without("meta.json", key), "meta.json", key)
    for key, value in (
        ("schema_version", 2),
        ("schema_version", "1"),
        ("schema_version", True),
        ("schema_version", None),
        ("sha256", None),
        ("sha256", []),
        ("sha256", "x"),
        ("n_tokens", 5),
        ("n_tokens", [1, 2]),
        ("n_tokens", None),
        ("tokenizer", ["bytes"]),
        ("tokenizer", 3),
        ("source", None),
        ("source", {"a": 1}),
        ("licence", 5),
    ):
        yield case(f"meta.json with {key}={value!r}", with_value("meta.json", value, key), "meta.json", key)
    yield case("meta.json with NaN tokens", with_value("meta.json", math.nan, "n_tokens", "train"), "n_tokens")
    for split in ("train", "val"):
        yield case(f"n_tokens of {split} that lies", with_value("meta.json", 10**9, "n_tokens", split), "n_tokens")
        yield case(f"n_tokens of {split} negative", with_value("meta.json", -1, "n_tokens", split), "n_tokens")
        yield case(f"n_tokens of {split} missing", without("meta.json", "n_tokens", split), "n_tokens")
        yield case(f"sha256 of {split} missing", without("meta.json", "sha256", f"{split}.bin"), "sha256")
        yield case(f"sha256 of {split} null", with_value("meta.json", None, "sha256", f"{split}.bin"), "sha256")

    def place(what, make, *names):
        return Case(kind, what, make, names)

    def open_at(path, **options):
        return lambda: dataset.load_token_data(path, **{"vocab_size": 256, "block_size": 8, **options})

    yield place("no folder", lambda folder: open_at(folder / "missing"), "{folder}/missing")
    yield place("a file in place of the folder", lambda folder: open_at(write(folder / "file")), "{folder}/file")
    yield place(
        "a folder name with blanks and non-ASCII, empty",
        lambda folder: open_at(
            os.makedirs(folder / "donn\xe9es du r\xe8glement") or folder / "donn\xe9es du r\xe8glement"
        ),
        "donn\xe9es",
    )
    yield place("a name of 5000 characters", lambda folder: open_at(folder / ("x" * 5000)), "xxx")
    yield place("NUL in the name", lambda folder: open_at(str(folder) + "/a\0b"))
    yield place(
        "one file: missing",
        lambda folder: lambda: dataset.open_token_file(folder / "x.bin", vocab_size=256, block_size=8),
        "x.bin",
    )
    yield place(
        "one file: a folder",
        lambda folder: lambda: dataset.open_token_file(folder, vocab_size=256, block_size=8),
        "{folder}",
    )
    yield place(
        "one file: a token >= vocab_size",
        lambda folder: functools.partial(
            dataset.open_token_file, write(folder / "x.bin", b"\xff\xff" * 100), vocab_size=256, block_size=8
        ),
        "65535",
        "256",
    )
    yield place(
        "one file: odd",
        lambda folder: functools.partial(
            dataset.open_token_file, write(folder / "x.bin", b"\0" * 999), vocab_size=256, block_size=8
        ),
        "999",
    )

    for count in (0, -1, 10**6):
        yield place(
            f"{count} validation windows",
            lambda folder, count=count: lambda: dataset.validation_windows(10, count),
            str(count),
        )


# ----------------------------------------------------------------------------------------------------- text sources


def prepared(folder, path, **options):
    return lambda: prepare.prepare_source(
        Path(path), folder / "out", tokenizer.get_tokenizer("bytes"), progress=False, **options
    )


def texts(originals):
    kind = "text sources"

    def case(what, name, content, *names, **options):
        return Case(kind, what, lambda folder: prepared(folder, write(folder / name, content), **options), names)

    good = LINE * 3
    for what, line in {
        "broken JSON": b'{"text": ',
        "no object": b'["x"]',
        "a number": b"3",
        "a string": b'"x"',
        "not UTF-8": b'{"text": "\xff"}',
        "no text field": b'{"words": "x"}',
        "text a number": b'{"text": 5}',
        "text an object": b'{"text": {"a": 1}}',
        "text a mixed list": b'{"text": ["a", 5]}',
        "nested too deeply": b"[" * 100_000,
        "a number of 5000 digits": b'{"n": ' + b"1" * 5000 + b"}",
        "a NUL": b'{"text": "a"}\0',
        "a control character": b'{"text": "a\x01"}',
        "UTF-16": '{"text": "x"}'.encode("utf-16-le"),
        "two values": b'{"text": "a"}{"text": "b"}',
        "a pickle": PICKLE,
        "single quotes": b"{'text': 'x'}",
        "trailing comma": b'{"text": "x",}',
        "Latin-1": '{"text": "r\xe8glement"}'.encode("latin-1"),
        "text true": b'{"text": true}',
    }.items():
        yield case(f"JSONL, line 3: {what}", "a.jsonl", LINE * 2 + line + b"\n" + good, "a.jsonl:3")
        yield case(
            f"JSONL.gz, line 3: {what}", "a.jsonl.gz", gzip.compress(LINE * 2 + line + b"\n" + good), "a.jsonl.gz:3"
        )
    yield case(
        "JSONL, a long document with a bad byte at its end",
        "a.jsonl",
        LINE + b'{"text": "' + b"x" * 10**6 + b'\xff"}\n',
        "a.jsonl:2",
    )
    yield case("JSON, item 2 no object", "a.json", [{"text": "x"}, 3], "item 2")
    yield case("JSON, cut", "a.json", b'[{"text": "x"}', "a.json")
    for what, content in {
        "no document": b"",
        "one document": LINE,
        "only empty documents": b'{"text": ""}\n' * 5,
        "only blanks": b'{"text": " \\n\\t"}\n' * 5,
        "only blank lines": b"\n" * 50,
        "only null": b'{"text": null}\n' * 3,
    }.items():
        yield case(f"JSONL, {what}", "a.jsonl", content, "documents with text")
    yield case("text not UTF-8", "a.txt", b"caf\xe9", "a.txt", "0xe9")
    for encoding in ("utf-16", "utf-16-le"):
        yield case(f"text {encoding}", "a.txt", ("x y " * 9).encode(encoding), "a.txt", "iconv")
    yield case("CSV, a quotation without an end", "a.csv", 'id,text\n1,"x\n', "a.csv")
    for suffix in (".doc", ".npy", ".pkl", ".pt", ".tar.gz", ".bin", "", ".parquet.xz"):
        yield case(f"a file that ends in {suffix or 'nothing'}", f"a{suffix}", PICKLE, f"a{suffix}", "unknown kind")
    for name in ("a.jsonl", "a.txt", "a.json", "a.jsonl.gz", "a.zip", "a.parquet"):
        for no_file in ("fifo", "broken link", "endless device", "link to itself"):

            def make(folder, name=name, no_file=no_file):
                instead(name, no_file)(folder)
                return prepared(folder, folder / name)

            yield Case(kind, f"{name}: {no_file}", make, (name,))

    def fifo_inside(folder):
        write(folder / "docs" / "a.jsonl", good)
        os.mkfifo(folder / "docs" / "b.jsonl")
        return prepared(folder, folder / "docs")

    yield Case(kind, "a folder with a fifo in it", fifo_inside, ("b.jsonl",))
    yield Case(kind, "missing", lambda folder: prepared(folder, folder / "no.jsonl"), ("no.jsonl",))
    yield Case(
        kind,
        "an empty folder",
        lambda folder: prepared(folder, os.makedirs(folder / "docs") or folder / "docs"),
        ("{folder}/docs",),
    )
    yield Case(
        kind,
        "a folder of other files",
        lambda folder: prepared(folder, write(folder / "docs" / "a.doc").parent),
        ("{folder}/docs",),
    )
    yield Case(
        kind,
        "a folder with only a validation split's text",
        lambda folder: prepared(
            folder, write(write(folder / "docs" / "dev.jsonl", good).with_name("train.jsonl"), b"").parent
        ),
        ("training",),
    )

    def split_and_more(folder):
        for name in ("train.jsonl", "dev.jsonl", "notes.txt"):
            write(folder / "docs" / name, good)
        return prepared(folder, folder / "docs")

    yield Case(kind, "a file beside the splits", split_and_more, ("notes.txt",))
    yield Case(
        kind, "a name of 5000 characters", lambda folder: prepared(folder, folder / ("x" * 5000 + ".jsonl")), ("xxx",)
    )
    yield Case(kind, "NUL in the name", lambda folder: prepared(folder, str(folder) + "/a\0b.jsonl"))
    yield case("text_field that no record has", "a.jsonl", good, "'body'", text_field="body")
    yield case("text_field empty", "a.jsonl", good, "text_field", text_field="")
    yield case("text_field of a number", "a.jsonl", b'{"n": 5}\n' * 3, "'n'", text_field="n")
    for value in (0.0, 1.0, -0.5, 1.5, math.nan, math.inf, -math.inf, 1e300):
        yield case(f"val_fraction={value}", "a.jsonl", good, "val_fraction", str(value), val_fraction=value)
    for name in ("eurlex58k", "", "../sample", "SAMPLE", "auto "):
        yield Case(
            kind,
            f"source {name!r}",
            lambda folder, name=name: (
                lambda: prepare.prepare_source(name, folder / "out", tokenizer.get_tokenizer("bytes"), progress=False)
            ),
            (repr(name),),
        )
        yield Case(
            kind,
            f"data_source {name!r}",
            lambda folder, name=name: lambda: prepare.resolve(folder / "out", name, "bytes"),
            (repr(name),),
        )
    yield Case(
        kind,
        "text_field for a named source",
        lambda folder: (
            lambda: prepare.prepare_source("sample", folder / "out", tokenizer.get_tokenizer("bytes"), text_field="x")
        ),
        ("text_field",),
    )
    yield Case(
        kind,
        "prepared data that is not there",
        lambda folder: lambda: prepare.resolve(folder / "out", "prepared", "bytes"),
        ("{folder}/out",),
    )

    def asked(**options):
        def make(folder):
            where = changed(originals.tokens, folder / "tokens", lambda folder: None)
            return lambda: prepare.resolve(where, **{"data_source": "auto", "tokenizer": "bytes", **options})

        return make

    yield Case(kind, "prepared data of another source", asked(data_source="eurlex57k"), ("'local'", "'eurlex57k'"))
    yield Case(kind, "prepared data of another tokenizer", asked(tokenizer="gpt2"), ("'bytes'", "'gpt2'"))
    for name in ("gpt3", "", "BYTES", "../gpt2"):
        yield Case(
            kind, f"tokenizer {name!r}", lambda folder, name=name: lambda: tokenizer.get_tokenizer(name), (repr(name),)
        )


# --------------------------------------------------------------------------------------------------------- archives


def zip_of(path, members):
    """A zip of (name or ZipInfo, content) pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def link_member(name, target):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info, target


def archives(originals):
    kind, both = "archives", [("train.jsonl", LINE * 2), ("dev.jsonl", LINE)]

    def case(what, members, *names, change=lambda data: data, expected="refused", kind=kind):
        def make(folder):
            path = zip_of(folder / "a" / "b" / "a.zip", members)
            path.write_bytes(change(bytearray(path.read_bytes())))
            return prepared(folder, path)

        return Case(kind, what, make, names, expected)

    outside = "archives with paths that lead outside"
    for prefix in (
        "../../x/",
        "/tmp/altgrad-outside/",
        "..\\..\\x/",
        "a/../../../",
        "C:/x/",
        "//host/x/",
        "~/",
        "./",
        "\u202e/",
        "x" * 300 + "/",
    ):
        yield case(
            f"members in {prefix[:20]}",
            [(prefix + name, content) for name, content in both],
            kind=outside,
            expected="harmless",
        )
    yield case(
        "members that are links",
        [link_member("train.jsonl", "/etc/passwd"), link_member("dev.jsonl", "../x")],
        "train.jsonl:1",
        kind=outside,
    )
    yield case("no members", [], "train.jsonl")
    yield case("no dev.jsonl", both[:1], "dev.jsonl")
    yield case("two train.jsonl", [*both, ("x/train.jsonl", LINE)], "2 members")
    yield case("train.jsonl a folder", [("train.jsonl/", b""), both[1]], "train.jsonl")
    yield case("empty members", [("train.jsonl", b""), ("dev.jsonl", b"")], "documents with text")
    yield case("a broken line in dev.jsonl", [both[0], ("dev.jsonl", LINE + b"{")], "dev.jsonl:2")
    yield case("cut to half", both, "a.zip", change=lambda data: data[: len(data) // 2])
    yield case("cut by a byte", both, "a.zip", change=lambda data: data[:-1])
    yield case(
        "zeroed in the middle",
        [("train.jsonl", os.urandom(200)), both[1]],
        "a.zip",
        change=lambda data: data[:40] + bytes(40) + data[80:],
    )
    yield case("not a zip", [], "a.zip", change=lambda data: bytearray(b"hello"))
    yield case("a zip's end alone", [], "train.jsonl", change=lambda data: bytearray(b"PK\5\6" + bytes(18)))
    yield case("a pickle called zip", [], "a.zip", change=lambda data: bytearray(PICKLE))

    def header(signature, offset, new):
        def change(data):
            at = -1
            while (at := data.find(signature, at + 1)) >= 0:
                data[at + offset : at + offset + len(new)] = new
            return data

        return change

    yield case(
        "encrypted",
        both,
        "encrypted",
        change=lambda data: header(b"PK\1\2", 8, b"\1")(header(b"PK\3\4", 6, b"\1")(data)),
    )
    yield case(
        "an unknown compression",
        both,
        "a.zip",
        change=lambda data: header(b"PK\1\2", 10, b"\x63")(header(b"PK\3\4", 8, b"\x63")(data)),
    )
    yield case("a wrong checksum of a member", both, "a.zip", change=header(b"PK\1\2", 16, b"\1\2\3\4"))
    yield case(
        "a size that lies", both, "a.zip", change=header(b"PK\1\2", 24, b"\xff\xff\xff\x7f"), expected="harmless"
    )
    yield case("an offset that lies", both, "a.zip", change=header(b"PK\1\2", 42, b"\xff\xff\xff\x7f"))

    bombs = "files that unpack without end"

    def bomb(what, name, pack):
        def make(folder):
            path = folder / name
            pack(path, b"[" + b" " * 2**22)
            call = prepared(folder, path)

            def limited():
                with mock.patch.object(documents, "MAX_DOCUMENT_BYTES", 2**20):
                    call()

            return limited

        return Case(bombs, what, make, ("longer than 1 MiB",))

    yield bomb("a JSONL.gz of one line", "a.jsonl.gz", lambda path, data: write(path, gzip.compress(data)))
    yield bomb(
        "a JSONL.gz in a JSONL.gz",
        "a.jsonl.gz",
        lambda path, data: write(path, gzip.compress(gzip.compress(data) + data)),
    )
    yield bomb("a zip of one line", "a.zip", lambda path, data: zip_of(path, [("train.jsonl", data), both[1]]))
    yield bomb("a JSONL of one line", "a.jsonl", write)
    yield bomb("a TXT", "a.txt", write)
    yield bomb("a JSON", "a.json", write)

    gz, good = "compressed files", gzip.compress(LINE * 50)
    for what, data in {
        "cut": good[:-9],
        "without its checksum": good[:-4],
        "not gzip": LINE,
        "a wrong checksum": good[:-8] + b"\0\0\0\0" + good[-4:],
        "noise behind the end": good + b"noise",
        "a flipped byte": good[:20] + bytes([good[20] ^ 0xFF]) + good[21:],
        "only a header": good[:10],
        "empty": b"",
    }.items():
        yield Case(
            gz,
            f"JSONL.gz: {what}",
            lambda folder, data=data: prepared(folder, write(folder / "a.jsonl.gz", data)),
            ("documents with text" if what == "empty" else "a.jsonl.gz",),
        )
    import importlib.util

    if importlib.util.find_spec("zstandard"):
        import zstandard

        good = zstandard.compress(LINE * 50)
        for what, data in {
            "cut": good[:-2],
            "not zstd": LINE,
            "a flipped byte": good[:9] + bytes([good[9] ^ 0xFF]) + good[10:],
            "noise behind the end": good + b"noise",
        }.items():
            yield Case(
                gz,
                f"JSONL.zst: {what}",
                lambda folder, data=data: prepared(folder, write(folder / "a.jsonl.zst", data)),
                ("a.jsonl.zst",),
            )
        yield bomb("a JSONL.zst of one line", "a.jsonl.zst", lambda path, data: write(path, zstandard.compress(data)))
    if importlib.util.find_spec("pyarrow"):
        for what, data in {
            "only its first bytes": b"PAR1",
            "a pickle": PICKLE,
            "a footer that lies": b"PAR1" + b"\xff" * 100 + struct.pack("<I", 50) + b"PAR1",
            "empty": b"",
        }.items():
            yield Case(
                gz,
                f"parquet: {what}",
                lambda folder, data=data: prepared(folder, write(folder / "a.parquet", data)),
                ("a.parquet",),
            )

    def wheel(what, change, *names):
        def make(folder):
            path = changed(originals.wheel, folder / "sample.whl", change)
            return lambda: list(sources.read_sample_wheel(path))

        return Case("the sample's wheel", what, make, names)

    def db(content):
        return lambda path: zip_of(path, [(sources.SAMPLE_DB, content)])

    yield wheel("no zip", lambda path: write(path, b"x"), "sample.whl")
    yield wheel("no database in it", lambda path: zip_of(path, both), "sample.whl", sources.SAMPLE_DB)
    yield wheel("no SQLite file", db(b"not a database at all"), sources.SAMPLE_DB)
    yield wheel("an SQLite file without the table", db(b""), sources.SAMPLE_DB)
    yield wheel("a pickle for the database", db(PICKLE), sources.SAMPLE_DB)


# -------------------------------------------------------------------------------------------------------- downloads


class _Liar(http.server.BaseHTTPRequestHandler):
    """Answers as the path says; the honest file is 1000 times b"a"."""

    def do_GET(self):
        body, send = b"a" * 1000, True
        code = int(self.path[1:]) if self.path[1:].isdecimal() else 200
        self.send_response(code)
        if self.path == "/loop" or code in (301, 302):
            self.send_header("Location", "file:///etc/passwd" if code == 302 else self.path)
        if self.path == "/wrong":
            body = b"b" * 1000
        if self.path == "/longer":
            body = b"a" * 5000
        if self.path == "/shorter":
            body = b"a" * 10
        if self.path == "/stall-headers":
            self.server.released.wait(5)
        if self.path == "/negative":
            self.send_header("Content-Length", "-5")
        elif self.path != "/unannounced":
            self.send_header("Content-Length", str(1000 if self.path in ("/cut", "/stall", "/drip") else len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            if self.path in ("/cut", "/stall"):
                self.wfile.write(b"a" * 100)
                self.wfile.flush()
                send = False
            if self.path == "/stall":
                self.server.released.wait(5)
            if self.path == "/drip":
                send = False
                while not self.server.released.wait(0.05):
                    self.wfile.write(b"a" * 200)
            if self.path == "/unannounced":
                body = b"a" * 50_000
            if send:
                self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def liar():
    """A local server that stalls and lies; yields its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Liar)
    server.released, server.daemon_threads, server.block_on_close = threading.Event(), True, False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def downloads(originals):
    import hashlib

    sha256 = hashlib.sha256(b"a" * 1000).hexdigest()

    def case(path, what, *names, **options):
        def make(folder):
            (folder / "cache").mkdir()

            def fetch():
                with liar() as address, mock.patch.object(sources, "RETRIES", 0):
                    sources.download(
                        address + path,
                        folder / "cache" / "file",
                        progress=False,
                        **{"n_bytes": 1000, "sha256": sha256, "stall_seconds": 0.2, **options},
                    )

            return fetch

        return Case("downloads", what, make, names)

    yield case("/wrong", "a wrong checksum", sha256)
    yield case("/longer", "more bytes than expected", "1,000 bytes")
    yield case("/unannounced", "more bytes than expected, unannounced", "1,000 bytes")
    yield case("/shorter", "fewer bytes than expected", sha256)
    yield case("/cut", "cut off", "/cut")
    yield case("/stall", "a stall in the middle", "/stall")
    yield case("/stall-headers", "a stall before the first byte", "/stall-headers")
    yield case("/drip", "some bytes now and then", "in time", total_seconds=0.2)
    yield case("/negative", "a negative length, honest bytes", sha256, sha256="0" * 63 + "1")
    for code in (401, 403, 404, 429, 500, 503):
        yield case(f"/{code}", f"HTTP {code}", str(code))
    yield case("/301", "a redirection to itself", "/301")
    yield case("/302", "a redirection to a file of this machine", "/302")

    def unreachable(folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return lambda: sources.download(
            f"http://127.0.0.1:{port}/x", folder / "x", n_bytes=1, sha256=sha256, progress=False, stall_seconds=0.2
        )

    yield Case("downloads", "nobody listens", unreachable, ("127.0.0.1",))

    def unwritable(folder):
        write(folder / "cache")

        def fetch():
            with liar() as address:
                sources.download(address + "/", folder / "cache" / "file", n_bytes=1000, sha256=sha256, progress=False)

        return fetch

    yield Case("downloads", "a file in place of the cache folder", unwritable, ("{folder}/cache", "--cache_dir"))


# -------------------------------------------------------------------------------------- checkpoints and run folders


def checkpoints(originals):
    kind = "checkpoints"
    meta = "2/meta/metadata"

    def case(what, change, *names, step=None, at="run"):
        def make(folder):
            changed(originals.run, folder / "run", change)

            def load():
                from altgrad_jax.inference.generate import load_model

                return load_model(folder / at, step)

            return load

        return Case(kind, what, make, names)

    yield case("a run folder without checkpoints", remove("2"), "{folder}/run")
    yield case("a step that is not there", lambda folder: None, "step 7", step=7)
    yield case("a negative step", lambda folder: None, "step -1", step=-1)
    yield case("another step than the checkpoint's own", lambda folder: None, "step 7", step=7, at="run/2")
    yield case("no folder", lambda folder: None, "{folder}/missing", at="missing")
    yield case("a file of the run", lambda folder: None, "manifest.json", at="run/manifest.json")
    yield case("a folder inside the checkpoint", lambda folder: None, "{folder}/run/2/state", at="run/2/state")
    yield case("no metadata", remove(meta), "metadata")
    yield case("no arrays", remove("2/state"), "state/")
    for what, content in NOT_JSON.items():
        yield case(f"metadata {what}", put(meta, content), "metadata")
    yield case("metadata: a folder", instead(meta, "folder"), "metadata")
    yield case("metadata: a broken link", instead(meta, "broken link"), "metadata")
    yield case("metadata: another config than was saved", with_value(meta, 3, "meta", "config", "n_layer"), "sha256")

    def resealed(change):
        """A change of the metadata with a sha256 that fits again: another program's, not damage."""

        def apply(folder):
            from altgrad_jax.run import checkpoint

            value = json.loads((folder / meta).read_bytes())
            del value["sha256"]
            change(value)
            write(folder / meta, {**value, "sha256": checkpoint._document_digest(value)})

        return apply

    yield case("of a later version", resealed(lambda value: value.update(schema_version=99)), "99")
    yield case("without parameters", resealed(lambda value: value.update(arrays={})), "no parameters")
    yield case("without settings", resealed(lambda value: value["meta"].pop("config")), "does not record")
    yield case("without n_head", resealed(lambda value: value["meta"]["config"].pop("n_head")), "n_head")
    yield case("with n_head=0", resealed(lambda value: value["meta"]["config"].update(n_head=0)), "n_head")
    yield case("with n_layer='many'", resealed(lambda value: value["meta"]["config"].update(n_layer="many")), "n_layer")
    for name, value in (
        ("tokenizer", ["bytes"]),
        ("tokenizer", "bytes2"),
        ("eval_windows", 0),
        ("eval_batch_size", "x"),
        ("scaling", 5),
        ("formats", 5),
        ("block_size", 8.0),
        ("dropout", math.nan),
    ):
        yield case(
            f"with {name}={value!r}",
            resealed(lambda document, name=name, value=value: document["meta"]["config"].update({name: value})),
            name,
        )
    yield case("without a tokenizer", resealed(lambda value: value["meta"]["config"].pop("tokenizer")), "tokenizer")
    yield case(
        "with heads that do not fit", resealed(lambda value: value["meta"]["config"].update(n_head=3)), "n_head=3"
    )
    yield case(
        "with an unknown compute_dtype",
        resealed(lambda value: value["meta"]["config"].update(compute_dtype="float7")),
        "float7",
    )
    yield case(
        "with formats that are no formats",
        resealed(lambda value: value["meta"]["config"].update(use_fp8=True, formats=["E9M9"])),
        "M9",
    )

    def arrays(change):
        def apply(folder):
            files = [path for path in sorted((folder / "2" / "state").rglob("*")) if path.is_file()]
            change(max(files, key=lambda path: path.stat().st_size))

        return apply

    yield case("arrays cut", arrays(lambda path: os.truncate(path, path.stat().st_size // 2)), "run/2")
    yield case("arrays empty", arrays(lambda path: os.truncate(path, 0)), "run/2")
    yield case("arrays missing", arrays(os.remove), "run/2")
    yield case("arrays with a flipped byte", arrays(lambda path: flip(path.name)(path.parent)), "run/2")

    def trained(what, make_folder, *names, kind="run folders that training is to go on with", data=None, **changes):
        resume = changes.pop("resume", "auto")

        def make(folder):
            make_folder(folder / "run")
            where = originals.tokens if data is None else changed(originals.tokens, folder / "tokens", data)

            def go():
                from altgrad_jax import train

                return train(tiny(**changes), data_dir=where, workdir=folder / "run", resume=resume)

            return go

        return Case(kind, what, make, names)

    def run_with(change):
        return lambda where: changed(originals.run, where, change)

    manifest = "manifest.json"
    same = run_with(lambda folder: None)
    yield trained("another learning rate", same, "learning_rate", learning_rate=0.5)
    yield trained("another model", same, "n_layer", n_layer=3)
    yield trained("another seed", same, "seed", seed=7)
    yield trained("--resume=never", same, "not empty", resume="never")
    yield trained("a checkpoint that is not there", same, "3", resume=3)
    yield trained("resume='sometimes'", same, "'sometimes'", resume="sometimes")
    yield trained("resume=True", same, "True", resume=True)
    yield trained("resume=2.0", same, "2.0", resume=2.0)
    yield trained("checkpoints without a manifest", run_with(remove(manifest)), manifest)
    for what, content in NOT_JSON.items():
        yield trained(f"{manifest} {what}", run_with(put(manifest, content)), manifest)
    for no_file in NO_FILES:
        yield trained(f"{manifest}: {no_file}", run_with(instead(manifest, no_file)), manifest)
    for key in ("config", "data", "starts", "schema_version", "run_id"):
        yield trained(f"{manifest} without {key}", run_with(without(manifest, key)), manifest, key)
    for key, value in (
        ("config", None),
        ("config", []),
        ("config", "x"),
        ("data", 5),
        ("data", []),
        ("starts", {}),
        ("starts", None),
        ("schema_version", 99),
        ("schema_version", "2"),
        ("schema_version", None),
    ):
        yield trained(f"{manifest} with {key}={value!r}", run_with(with_value(manifest, value, key)), manifest, key)
    yield trained(
        f"{manifest} without the data's fingerprint",
        run_with(without(manifest, "data", "fingerprint")),
        manifest,
        "fingerprint",
    )
    yield trained(
        f"{manifest} with a setting of another version", run_with(with_value(manifest, 1, "config", "novel")), "novel"
    )
    refused = "data that training is given"
    yield trained(
        "changed since it was prepared", lambda where: None, "train.bin", "sha256", kind=refused, data=flip("train.bin")
    )
    yield trained(
        "of tokens >= vocab_size",
        lambda where: None,
        "65535",
        "256",
        kind=refused,
        data=lambda folder: (write(folder / "train.bin", b"\xff\xff" * 100), remove("meta.json")(folder)),
    )
    yield trained(
        "shorter than a window",
        lambda where: None,
        "block_size",
        kind=refused,
        data=lambda folder: None,
        block_size=2**12,
    )
    yield trained("missing", lambda where: None, "train.bin", kind=refused, data=remove("train.bin"))
    yield trained("a workdir that is a file", lambda where: write(where, b""), "{folder}/run")


def records(originals):
    def manifest(what, change, *names):
        def make(folder):
            changed(originals.run, folder / "run", change)

            def read():
                from altgrad_jax.run.record import read_manifest

                read_manifest(folder / "run")

            return read

        return Case("manifests", what, make, ("manifest.json", *names))

    yield manifest("missing", remove("manifest.json"))
    for what, content in NOT_JSON.items():
        yield manifest(what, put("manifest.json", content))
    for no_file in NO_FILES:
        yield manifest(no_file, instead("manifest.json", no_file))
    for key in ("config", "data", "starts", "schema_version"):
        yield manifest(f"without {key}", without("manifest.json", key), key)
        yield manifest(f"with {key} a number", with_value("manifest.json", 5, key), key)

    def evaluated(what, change, *names, **options):
        def make(folder):
            changed(originals.run, folder / "run", change)

            def evaluate():
                from altgrad_jax.inference.evaluate import evaluate_checkpoint

                evaluate_checkpoint(folder / "run", **{key: folder / value for key, value in options.items()})

            return evaluate

        return Case("evaluations", what, make, names)

    yield evaluated("no manifest", remove("manifest.json"), "{folder}/run")
    yield evaluated("a manifest without the data's folder", without("manifest.json", "data", "dir"), "dir")
    yield evaluated("a manifest with dir=5", with_value("manifest.json", 5, "data", "dir"), "dir")
    yield evaluated("data that is gone", with_value("manifest.json", "/nowhere/data", "data", "dir"), "/nowhere/data")
    yield evaluated("data_dir that is not there", lambda folder: None, "{folder}/none", data_dir="none")
    yield evaluated("a token file that is not there", lambda folder: None, "{folder}/none", token_file="none")
    yield evaluated(
        "a token file of other tokens", put("big.bin", b"\xff\xff" * 100), "65535", token_file="run/big.bin"
    )
    yield evaluated("a token file that is a folder", lambda folder: None, "{folder}/run", token_file="run")
    yield evaluated("a token file that is a fifo", instead("pipe", "fifo"), "pipe", token_file="run/pipe")

    def continued(what, change, *names, reading=False):
        def make(folder):
            changed(originals.run, folder / "run", change)

            def go():
                from altgrad_jax.run.record import Record, read_history

                if reading:
                    read_history(folder / "run")
                Record.open(folder / "run", 2).close()

            return go

        return Case("records that a run is to go on with", what, make, names or ("metrics.jsonl",))

    rows = ['{"step": 0, "val_loss": 5.5}', '{"step": 1, "loss": 5.5}', '{"step": 2, "loss": 5.4, "val_loss": 5.4}']

    def with_row(number, row):
        return put("metrics.jsonl", "\n".join([*rows[:number], row, *rows[number + 1 :]]).encode("latin-1") + b"\n")

    for name in ("metrics.jsonl", "timing.jsonl", "diagnostics.jsonl"):
        for no_file in ("folder", "fifo", "broken link", "endless device"):
            yield continued(f"{name}: {no_file}", instead(name, no_file), name)
    yield continued("missing", remove("metrics.jsonl"))
    yield continued("cut to half", cut("metrics.jsonl", 0.5))
    yield continued("empty", put("metrics.jsonl", b""))
    for row in (
        "",
        "{",
        "[]",
        '{"step": 1',
        '{"step": 1}{',
        '{"step": 7}',
        '{"step": 0}',
        '{"step": -1}',
        '{"stop": 1}',
        '{"step": ' + "9" * 5000 + "}",
        "\0" * 20,
        "\xff\xfe",
    ):
        yield continued(f"row 1 {row[:30]!r}", with_row(1, row))
    for row in (
        '{"step": 2, "val_loss": }',
        '{"step": 2, "val_loss": "x"}',
        '{"step": 2, "val_loss": null}',
        '{"step": 2, "val_loss": [5]}',
        '{"step": 2, "stable_rank/embed": "x"}',
        '{"step": 2, "val_loss": 5, }',
        '{"step": 2, "val_loss": ' + "[" * 100_000 + "}",
        '{"step": 2, "val_loss": 5.5, "alerts": 5}',
    ):
        yield continued(f"row 2 {row[:40]!r}", with_row(2, row))
        yield continued(f"row 2 {row[:40]!r}, read", with_row(2, row), reading=True)
    for row in ("\xff", "[]", "3", '{"step": 1, "alerts": [5]}', "[" * 100_000):
        yield continued(f"row 1 {row[:30]!r}, read", with_row(1, row), reading=True)

    line = {
        "step": 1,
        "layer": "block_0/mlp_up",
        "operand": "W",
        "format": "E4M3",
        "scale": 1.0,
        "amax": 1.0,
        "magnitudes": {"bins": 2220, "first": [1000], "counts": [[5]]},
    }

    def what_if(what, content, *names, step=None):
        def make(folder):
            path = folder / "diagnostics.jsonl"
            if callable(content):
                content(folder)
            else:
                write(path, content)

            def read():
                from altgrad_jax.numerics.whatif import of_diagnoses
                from altgrad_jax.run.record import read_diagnostics

                of_diagnoses(read_diagnostics(folder), step)

            return read

        return Case("histograms of a run", what, make, ("diagnostics.jsonl", *names))

    def lines(**changes):
        return json.dumps(line) + "\n" + json.dumps({**line, **changes}) + "\n"

    yield what_if("missing", lambda folder: None)
    yield what_if("empty", b"")
    yield what_if("a folder", instead("diagnostics.jsonl", "folder"))
    yield what_if("a fifo", instead("diagnostics.jsonl", "fifo"))
    yield what_if("a step that is not there", lines(), "step 7", step=7)
    for what, content in {
        "not UTF-8": b"\xff\xff\n",
        "broken JSON": b'{"step": \n',
        "a list": b"[]\n",
        "no step": b"{}\n",
        "nested too deeply": b"[" * 100_000 + b"\n",
    }.items():
        yield what_if(f"line 2 {what}", json.dumps(line).encode() + b"\n" + content, "line 2")
    for changes in (
        {"step": "x"},
        {"step": None},
        {"magnitudes": 5},
        {"magnitudes": {"bins": 10, "first": [0], "counts": [[1]]}},
        {"magnitudes": {"bins": 2220, "first": [2219], "counts": [[1, 2, 3]]}},
        {"magnitudes": {"bins": 2220, "first": [0, 1], "counts": [[1]]}},
        {"magnitudes": {"bins": 10**15, "first": [], "counts": []}},
        {"magnitudes": {}},
        {"magnitudes": {"bins": 2220, "first": [-5], "counts": [[1]]}},
        {"amax": -1.0},
        {"magnitudes": {"bins": 2220, "first": [5], "counts": [["x"]]}},
    ):
        yield what_if(f"line 2 with {json.dumps(changes)[:90]}", lines(**changes), "line 2")
    yield what_if(
        "line 2 without layer",
        json.dumps(line) + "\n" + json.dumps({key: value for key, value in line.items() if key != "layer"}) + "\n",
        "line 2",
    )

    def reported(what, change, *names, expected="refused", at=("run",)):
        def make(folder):
            changed(originals.run, folder / "run", change)

            def build():
                from altgrad_jax import report

                report.build([folder / place for place in at]).markdown()

            return build

        return Case("runs that a report is to show", what, make, names, expected)

    # A damaged run is no reason to show nothing: the page names it and why.
    for what, content in NOT_JSON.items():
        yield reported(f"manifest.json {what}", put("manifest.json", content), expected="harmless")
        yield reported(f"verdict.json {what}", put("verdict.json", content), expected="harmless")
        yield reported(f"metrics.jsonl {what}", put("metrics.jsonl", content + b"\n"), expected="harmless")
        yield reported(f"timing.jsonl {what}", put("timing.jsonl", content + b"\n"), expected="harmless")
        yield reported(f"diagnostics.jsonl {what}", put("diagnostics.jsonl", content + b"\n"), expected="harmless")
    for name in ("manifest.json", "verdict.json", "metrics.jsonl"):
        for no_file in NO_FILES:
            yield reported(f"{name}: {no_file}", instead(name, no_file), expected="harmless")
    for key in settings.FIELDS:
        yield reported(f"manifest without {key}", without("manifest.json", "config", key), expected="harmless")
    for key, value in (
        ("max_steps", "x"),
        ("learning_rate", None),
        ("seed", []),
        ("formats", 5),
        ("use_fp8", "yes"),
        ("compute_dtype", []),
        ("eval_interval", None),
        ("warmup_steps", {}),
        ("optimizer", 3),
    ):
        yield reported(
            f"manifest with {key}={value!r}", with_value("manifest.json", value, "config", key), expected="harmless"
        )
    verdict = {"steps": 2, "stopped": None, "sound": True, "finished": True, "alerts": {}, "max_steps": 4}
    for key, value in (
        ("steps", "x"),
        ("steps", None),
        ("alerts", 5),
        ("alerts", [[]]),
        ("max_steps", []),
        ("sound", "x"),
        ("finished", None),
        ("steps", 10**30),
    ):
        yield reported(
            f"verdict with {key}={value!r}", put("verdict.json", {**verdict, key: value}), expected="harmless"
        )
    for row in (
        b'{"step": 3, "loss": "x"}',
        b'{"step": 3, "loss": null}',
        b'{"step": 3, "loss": 1e999}',
        b'{"step": -1}',
        b'{"step": 99999999999999999999999, "loss": 1.0}',
        b'{"step": 3, "loss": 1.2.3}',
    ):

        def append(folder, row=row):
            with open(folder / "metrics.jsonl", "ab") as file:
                file.write(row + b"\n")

        yield reported(f"metrics.jsonl with the row {row.decode()}", append, expected="harmless")
    yield reported("no folder", lambda folder: None, "{folder}/none", at=("none",))
    yield reported("a file", lambda folder: None, "manifest.json", at=("run/manifest.json",))
    yield reported(
        "no run folder in it", lambda folder: (folder.parent / "empty").mkdir(), "{folder}/empty", at=("empty",)
    )

    def other(folder):
        changed(originals.run, folder.parent / "other", with_value("manifest.json", 77, "config", "batch_size"))

    yield reported("runs that cannot be compared", other, "batch_size", "77", at=("run", "other"))


# ----------------------------------------------------------------------------------------- folders and other places


def folders(originals):
    kind = "folders"

    def preparing(out):
        def make(folder):
            source, where = write(folder / "a.jsonl", LINE * 4), out(folder)

            def go():
                with without_override():
                    prepare.prepare_source(source, where, tokenizer.get_tokenizer("bytes"), progress=False)

            return go

        return make

    def training(out):
        def make(folder):
            where = out(folder)
            tokens = originals.tokens

            def go():
                from altgrad_jax import train

                with without_override():
                    train(tiny(), data_dir=tokens, workdir=where)

            return go

        return make

    def exporting(out):
        def make(folder):
            where = out(folder)
            tensors = {"x": np.zeros(3, np.float32)}

            def go():
                from altgrad_jax.models import hf

                with without_override():
                    hf.write_folder(where, tensors, {})

            return go

        return make

    def reporting(out):
        def make(folder):
            where = out(folder)

            class Page:
                def html(self):
                    return "x"

                def data(self):
                    return [("a.csv", b"x")]

            def go():
                from altgrad_jax import report

                with without_override():
                    report.write(Page(), [where / "report.html"], where / "data")

            return go

        return make

    def read_only(folder):
        (folder / "locked").mkdir(mode=0o555)
        return folder / "locked" / "out"

    def named(folder):
        (folder / "r\xe8gles et \u6cd5").mkdir()
        return folder / "r\xe8gles et \u6cd5"

    def loop(folder):
        instead("loop", "link to itself")(folder)
        return folder / "loop" / "out"

    def sweeping(out):
        def make(folder):
            where, tokens = out(folder), originals.tokens

            def go():
                from altgrad_jax.run import sweep

                with without_override():
                    members = sweep.make_members(tiny(), sweep.parse_axes("seed=1"), where)
                    sweep.sweep(members, where, data_dir=tokens)

            return go

        return make

    places = {
        "in a read-only folder": (read_only, "{folder}/locked"),
        "below a file": (lambda folder: write(folder / "file") / "out", "{folder}/file"),
        "below a link to itself": (loop, "{folder}/loop"),
        "where nothing can be made": (lambda folder: Path("/proc/altgrad/out"), "/proc/altgrad"),
        "of 300 characters in one name": (lambda folder: folder / ("x" * 300) / "out", "xxx"),
        "in a read-only folder with blanks and non-ASCII": (lambda folder: read_only(named(folder)), "r\xe8gles et"),
    }
    for user, make in {
        "token files": preparing,
        "a run": training,
        "an export": exporting,
        "a report": reporting,
        "a sweep": sweeping,
    }.items():
        for what, (out, name) in places.items():
            # Of a sweep, --out is looked at where it is read.
            if (user, what) != ("a sweep", "of 300 characters in one name"):
                yield Case(kind, f"{user} {what}", make(out), (name,))
        yield Case(
            kind, f"{user} in the place of a file", make(lambda folder: write(folder / "file")), ("{folder}/file",)
        )
    yield Case(
        kind, "token files beside other files", preparing(lambda folder: write(folder / "o" / "x").parent), ("x",)
    )
    yield Case(
        kind,
        "token files in a folder that has some, without force",
        preparing(lambda folder: changed(originals.tokens, folder / "tokens", lambda folder: None)),
        ("--force",),
    )
    yield Case(
        kind,
        "an export into a folder that is not empty",
        exporting(lambda folder: write(folder / "o" / "x").parent),
        ("{folder}/o",),
    )

    def unreadable(folder):
        path = write(folder / "a.jsonl", LINE)
        path.chmod(0)

        def go():
            with without_override():
                prepared(folder, path)()

        return go

    yield Case(kind, "text that may not be read", unreadable, ("a.jsonl",))

    def locked(what, original, name, read):
        def make(folder):
            changed(getattr(originals, original), folder / "it", lambda it: (it / name).chmod(0))

            def go():
                with without_override():
                    read(folder / "it")

            return go

        return Case(kind, f"{what}: {name} may not be read", make, (name,))

    def load(it):
        return dataset.load_token_data(it, vocab_size=256, block_size=8)

    def load_hf(it):
        from altgrad_jax.models import hf

        hf.read_folder(it)

    def load_manifest(it):
        from altgrad_jax.run.record import read_manifest

        read_manifest(it)

    def load_record(it):
        from altgrad_jax.run.record import read_history

        read_history(it)

    for name in ("train.bin", "val.bin", "meta.json"):
        yield locked("token files", "tokens", name, load)
    for name in ("config.json", "model.safetensors"):
        yield locked("a Hugging Face folder", "hf", name, load_hf)
    yield locked("a run", "run", "manifest.json", load_manifest)
    yield locked("a run", "run", "metrics.jsonl", load_record)


def rank_files(originals):
    data = tokenizer.rank_files_dir()

    def case(what, change, *names):
        return Case(
            "tokenizer files",
            what,
            lambda folder: functools.partial(tokenizer.gpt2_ranks, changed(data, folder / "ranks", change)),
            names,
        )

    for name in ("vocab.bpe", "encoder.json"):
        yield case(f"{name} missing", remove(name), name)
        yield case(f"{name} cut", cut(name, 0.5), name, "sha256")
        yield case(f"{name} with a flipped byte", flip(name), name, "sha256")
        yield case(f"{name} empty", put(name, b""), name, "sha256")
        yield case(f"{name} a pickle", put(name, PICKLE), name, "sha256")
        for no_file in NO_FILES:
            yield case(f"{name}: {no_file}", instead(name, no_file), name)
    for ids in ([-1], [256], [10**9], [0, 65535]):
        yield Case(
            "tokenizer files",
            f"ids {ids} to decode",
            lambda folder, ids=ids: lambda: tokenizer.get_tokenizer("bytes").decode(ids),
            (str(ids[-1]),),
        )


def hf_folders(originals):
    def case(what, change, *names):
        def make(folder):
            changed(originals.hf, folder / "hf", change)

            def read():
                from altgrad_jax.models import hf

                hf.from_hf(*hf.read_folder(folder / "hf"))

            return read

        return Case("Hugging Face folders", what, make, names)

    config, weights = "config.json", "model.safetensors"
    yield case("no config.json", remove(config), config)
    yield case("no weights", remove(weights), weights)
    yield case(
        "only a pickle",
        lambda folder: (remove(weights)(folder), put("pytorch_model.bin", PICKLE)(folder)),
        "pytorch_model.bin",
    )
    for what, content in NOT_JSON.items():
        yield case(f"config.json {what}", put(config, content), config)
        yield case(
            f"the index {what}",
            lambda folder, content=content: (
                remove(weights)(folder),
                put("model.safetensors.index.json", content)(folder),
            ),
            "model.safetensors.index.json",
        )
    for no_file in NO_FILES:
        yield case(f"config.json: {no_file}", instead(config, no_file), config)
        yield case(f"weights: {no_file}", instead(weights, no_file), weights)
    for key, value in (
        ("model_type", ["gpt2"]),
        ("layer_norm_epsilon", 1e-3),
        ("layer_norm_epsilon", math.nan),
        ("n_layer", 0),
        ("n_layer", -1),
        ("n_layer", "2"),
        ("n_layer", 1.0),
        ("n_layer", True),
        ("n_layer", 10**9),
        ("n_layer", 2),
        ("n_head", 3),
        ("n_head", None),
        ("n_embd", 16),
        ("vocab_size", 300),
        ("vocab_size", math.inf),
        ("n_positions", 9),
        ("activation_function", "relu"),
        ("activation_function", {"a": 1}),
        ("n_inner", 7),
        ("n_inner", "32"),
        ("resid_pdrop", 0.5),
        ("scale_attn_weights", False),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("quantization_config", {"bits": 4}),
        ("pruned_heads", {"0": [1]}),
    ):
        yield case(
            f"config.json with {key}={value!r}",
            with_value(config, value, key),
            key.replace("n_layer", "")
            if value in (2, 10**9)
            else "wte"
            if key == "vocab_size" and value == 300
            else "wpe"
            if key == "n_positions"
            else ""
            if key == "n_embd"
            else key,
        )
    yield case("config.json of GPT-2 that says llama", with_value(config, "llama", "model_type"), "num_hidden_layers")
    for value in (-0.1, 1.0, math.nan, "0", None, True):
        yield case(
            f"config.json with both dropouts {value!r}",
            edit(config, lambda c, value=value: c.update(resid_pdrop=value, embd_pdrop=value)),
            "resid_pdrop",
        )
    for size in (0, 2, 2**62, 2**64 - 1):
        yield case(
            f"a header that says {size} bytes",
            lambda folder, size=size: write(
                folder / weights, struct.pack("<Q", size) + (folder / weights).read_bytes()[8:]
            ),
            weights,
        )
    yield case("weights cut", cut(weights, 0.5), weights)
    yield case("weights empty", put(weights, b""), weights)
    yield case("weights a pickle", put(weights, PICKLE), weights)
    yield case("weights with a broken header", flip(weights, 0.001), weights)

    def header(change):
        def apply(folder):
            data = (folder / weights).read_bytes()
            size = struct.unpack("<Q", data[:8])[0]
            value = json.loads(data[8 : 8 + size])
            change(value)
            text = json.dumps(value).encode()
            write(folder / weights, struct.pack("<Q", len(text)) + text + data[8 + size :])

        return apply

    name = "transformer.ln_f.bias"
    yield case("offsets beyond the end", header(lambda v: v[name].update(data_offsets=[0, 10**12])), weights)
    yield case("offsets backwards", header(lambda v: v[name].update(data_offsets=[64, 0])), weights)
    yield case("a shape that lies", header(lambda v: v[name].update(shape=[10**6])), weights)
    yield case("a shape that overflows", header(lambda v: v[name].update(shape=[2**40, 2**40])), weights)
    yield case("a dtype that is none", header(lambda v: v[name].update(dtype="F7")), weights)
    yield case("an integer dtype", header(lambda v: v[name].update(dtype="I32")), name)
    yield case("an array less", header(lambda v: v.update({"other": v.pop(name)})), "ln_f.bias")
    yield case("a transposed array", header(lambda v: v["transformer.wpe.weight"].update(shape=[64])), "wpe.weight")
    for target in ("../outside.safetensors", "/etc/passwd", "missing.safetensors"):
        yield case(
            f"an index that names {target}",
            lambda folder, target=target: (
                remove(weights)(folder),
                put("model.safetensors.index.json", {"weight_map": {"a": target}})(folder),
            ),
            "safetensors",
        )
    for value in (None, [], {}, {"a": 5}, {"a": ""}, {"a": "."}, {"a": ".."}, {"a": "\0"}):
        yield case(
            f"an index with weight_map={value!r}",
            lambda folder, value=value: (
                remove(weights)(folder),
                put("model.safetensors.index.json", {"weight_map": value})(folder),
            ),
            "hf/",
        )
    yield Case(
        "Hugging Face folders",
        "no folder",
        lambda folder: lambda: __import__("altgrad_jax.models.hf", fromlist=["hf"]).read_folder(folder / "none"),
        ("{folder}/none",),
    )


# ---------------------------------------------------------------------------------------------- flags, config files


def config_files(originals):
    def case(what, content, *names, spec=None):
        def make(folder):
            if callable(content):
                content(folder)
            else:
                write(folder / "my.py", content)
            given = (spec or "{folder}/my.py").format(folder=folder)
            return lambda: cli.parse([f"--config={given}"], cli.new_flags())

        return Case("config files", what, make, names)

    head = "from altgrad_jax.config import default_config\ndef get_config():\n    c = default_config()\n"

    def lines(text):
        return f"{head}    {text}\n    return c\n"

    yield case("missing", lambda folder: None, "{folder}/my.py")
    yield case("an empty name", lambda folder: None, "--config", spec=" ")
    yield case("a folder", lambda folder: None, "{folder}", spec="{folder}")
    yield case("NUL in the name", lambda folder: None, "--config", spec="{folder}/a\0b.py")
    yield case("a name of 5000 characters", lambda folder: None, "--config", spec="x" * 5000)
    for no_file in NO_FILES[1:]:
        yield case(no_file, instead("my.py", no_file), "{folder}/my.py")
    for what, content, name in (
        ("empty", "", "get_config"),
        ("no get_config", "x = 1\n", "get_config"),
        ("get_config no function", "get_config = 5\n", "get_config"),
        ("get_config wants an argument", "def get_config(x): return x\n", "argument"),
        ("returns a dict", "def get_config(): return {'seed': 1}\n", "dict"),
        ("returns None", "def get_config(): pass\n", "NoneType"),
        ("returns an empty ConfigDict", "import ml_collections\nget_config = ml_collections.ConfigDict\n", "n_layer"),
        (
            "returns a FrozenConfigDict",
            "import ml_collections\nfrom altgrad_jax.config import default_config\n"
            "def get_config():\n    c = ml_collections.FrozenConfigDict(default_config())\n    return c\n",
            "FrozenConfigDict",
        ),
        ("NaN", lines("c.learning_rate = float('nan')"), "learning_rate=nan"),
        ("None", lines("c.seed = None"), "seed=None"),
        ("True", lines("c.max_steps = True"), "max_steps"),
        ("a setting taken out", lines("with c.unlocked(): del c.seed"), "seed"),
        ("a setting too many", lines("with c.unlocked(): c.novel = 1"), "novel"),
        ("a setting whose name is a number", lines("with c.unlocked(): c[5] = 1"), "name"),
        ("settings nested", lines("with c.unlocked(): c.model = {'n_layer': 2}"), "model"),
        (
            "three wrong at once",
            lines("c.seed = -1; c.max_steps = 0; c.beta1 = 1.0"),
            "seed",
        ),
    ):
        yield case(what, content, name)
    yield case("an argument that it does not take", f"{head}    return c\n", "argument", spec="{folder}/my.py:big")


def flags(originals):
    def case(words, *names, script="train.py"):
        def make(folder):
            def go():
                # The script's table of flags, and its main part only where all of them are accepted.
                parts = _script(script)
                argv = [CONFIG, f"--workdir={folder}/out", *words] if script == "train.py" else [CONFIG, *words]
                config, values = cli.parse(argv, parts["FLAGS"])
                if script == "train.py":
                    from altgrad_jax.run.processes import check_flags

                    check_flags(
                        *(values[name] for name in ("distributed", "coordinator", "num_processes", "process_id"))
                    )
                if script == "sweep.py":
                    from altgrad_jax.run import sweep

                    points = sweep.parse_axes(values["axes"]) if values["axes"] else cli.sweep_of(config)
                    sweep.make_members(config, points, folder / "out")
                    sweep.shard_of(values["shard"], {})
                    sweep.resolve_member_loop(values["member_loop"])

            return go

        return Case("flags", f"{script} {' '.join(words)[:100]!r}", make, names)

    for words, *names in (
        (["seed=3"], "--config.seed=3"),
        (["my.py"], "--config=my.py"),
        (["--confg.seed=3"], "--config.seed"),
        (["--config.sed=3"], "seed"),
        (["--config.=3"], "--help"),
        (["--config.model.n_layer=3"], "n_layer"),
        (["--seed=3"], "--config.seed"),
        (["--config"], "--config"),
        (["--config.seed"], "--config.seed"),
        (["--config.seed", "--dry_run"], "--config.seed"),
        (["--noconfig.seed"], "--noconfig.seed"),
        (["--noconfig.use_fp8=1"], "noconfig.use_fp8"),
        (["--resum=auto"], "--resume"),
        (["--resume="], "--resume="),
        (["--resume=-1"], "--resume=-1"),
        (["--resume=1e3"], "--resume=1e3"),
        (["--resume=\u0663"], "--resume=\u0663"),
        (["--resume=" + "9" * 30], "--resume=999"),
        (["--resume=None"], "--resume=None"),
        (["--resume=1.0"], "1.0"),
        (["--dry_run=maybe"], "maybe"),
        (["--dry_run=yes"], "yes"),
        (["--dry_run="], "--dry_run="),
        (["--workdir="], "--workdir"),
        (["--workdir= x"], "--workdir"),
        (["--workdir=gs://b/x"], "gs://b/x"),
        (["--workdir=/dev/null"], "/dev/null"),
        (["--workdir=~nobody-of-that-name/x"], "~nobody-of-that-name"),
        (["--config.checkpoint_dir=~nobody-of-that-name/x"], "checkpoint_dir"),
        (["--workdir=a\0b"], "--workdir"),
        (["--workdir=a\nb"], "--workdir"),
        (["--workdir=" + "x" * 5000], "--workdir"),
        (["--workdir=" + "x" * 300], "--workdir"),
        (["--data_dir=s3://x"], "s3://x"),
        (["--data_dir=/etc/passwd"], "/etc/passwd"),
        (["--data_dir"], "--data_dir"),
        (["--distributed=yes"], "--distributed=yes"),
        (["--distributed=auto", "--process_id=0"], "--process_id"),
        (["--process_id=0"], "--process_id"),
        (["--num_processes=2"], "--num_processes"),
        (["--num_processes=0"], "--num_processes=0"),
        (["--num_processes=-1"], "--num_processes=-1"),
        (["--num_processes=1e9"], "1e9"),
        (["--num_processes=99999999999"], "99999999999"),
        (["--coordinator=x"], "--coordinator"),
        (["--coordinator=x", "--num_processes=2", "--process_id=0"], "--coordinator=x"),
        (["--coordinator=x:y", "--num_processes=2", "--process_id=0"], "x:y"),
        (["--coordinator=x:99999", "--num_processes=2", "--process_id=0"], "x:99999"),
        (["--coordinator=x:0", "--num_processes=2", "--process_id=0"], "x:0"),
        (["--coordinator=x:1", "--num_processes=2", "--process_id=2"], "--process_id=2"),
        (["---config.seed=1"], "---config.seed"),
        (["-"], "-"),
        (["-x"], "-x"),
        ([""], "''"),
        (["--config.tags=a,a"], "tags"),
        (["--config.learning_rate=1e999"], "learning_rate=inf"),
        (["--config.seed=" + "9" * 5000], "seed"),
        (["--config.run_name=\ud800"], "run_name"),
        (["--config.use_fp8=vrai"], "vrai"),
    ):
        yield case(words, *names)
    for words, *names in (
        (["--axes=seed"], "--axes=seed"),
        (["--axes=;"], "--axes=;"),
        (["--axes=seed="], "--axes=seed="),
        (["--axes=seed=x"], "seed=x"),
        (["--axes=seed=1,"], "seed"),
        (["--axes=sed=1"], "seed"),
        (["--axes=seed=1;seed=2"], "seed"),
        (["--axes=seed=1,1"], "run_name"),
        (["--axes=seed=-1"], "seed=-1"),
        (["--axes=learning_rate=nan"], "nan"),
        (["--axes=tags=/"], "run_name"),
        (["--axes=run_name=../x"], "../x"),
        (["--axes=checkpoint_dir=/tmp/x"], "run_name"),
        (["--axes=seed=" + "9" * 400], "seed"),
        (["--axes=run_name=" + "x" * 300], "run_name"),
        (["--axes=n_head=3"], "n_head"),
        ([], "get_sweep"),
        (["--axes=seed=1", "--shard=0/2"], "0/2"),
        (["--axes=seed=1", "--shard=3/2"], "3/2"),
        (["--axes=seed=1", "--shard=1"], "--shard=1"),
        (["--axes=seed=1", "--shard=a/b"], "a/b"),
        (["--axes=seed=1", "--shard=\u0661/\u0662"], "--shard"),
        (["--axes=seed=1", "--member_loop=pmap"], "pmap"),
        (["--width=-1"], "--width=-1"),
        (["--width=65537"], "65537"),
        (["--width=\u00b2"], "--width"),
        (["--width="], "--width="),
        (["--memory=nan"], "nan"),
        (["--memory=-1"], "-1"),
        (["--memory=inf"], "inf"),
        (["--memory=x"], "x"),
        (["--cpu_devices=0"], "0"),
        (["--cpu_devices=1.5"], "1.5"),
        (["--out=gs://x"], "gs://x"),
        (["--dry_run=2"], "2"),
    ):
        yield case(words, *names, script="sweep.py")
    for words, *names in (
        (["--suite=all,none"], "all,none"),
        (["--suite="], "--suite="),
        (["--rounds=0"], "0"),
        (["--rounds=\u00b2"], "--rounds"),
        (["--steps_per_round=1e3"], "1e3"),
        (["--budget_s=-5"], "-5"),
        (["--quick=maybe"], "maybe"),
        (["--peers=jax"], "jax"),
        (["--nanogpt=/nowhere"], "/nowhere"),
        (["--profile=gs://x"], "gs://x"),
        (["--json=/proc/x/y"], "/proc/x/y"),
        (["--json="], "--json="),
        (["--json=/"], "--json=/"),
    ):
        yield case(words, *names, script="bench.py")
    for words, *names in (
        (["--rounds=\u00b2"], "--rounds"),
        (["--rounds=0"], "0"),
        (["--folder=/etc/passwd"], "/etc/passwd"),
    ):
        yield case(words, *names, script="bench_checkpoint.py")
    for words, *names in (
        (["--widths=\u00b2"], "--widths"),
        (["--widths=1,,2"], "1,,2"),
        (["--widths=0"], "0"),
        (["--processes=maybe"], "maybe"),
        (["--cpu_devices=x"], "x"),
    ):
        yield case(words, *names, script="bench_sweep.py")
    for variables in (
        {"SLURM_ARRAY_TASK_ID": "x", "SLURM_ARRAY_TASK_COUNT": "2"},
        {"SLURM_PROCID": "2", "SLURM_NTASKS": "2"},
        {"SLURM_PROCID": "-1", "SLURM_NTASKS": "2"},
        {"JAX_PROCESS_ID": "", "JAX_NUM_PROCESSES": "2"},
        {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "1e3"},
    ):

        def make(folder, variables=variables):
            def go():
                from altgrad_jax.run.sweep import shard_of

                shard_of("auto", variables)

            return go

        yield Case("flags", f"the environment {variables}", make, (next(iter(variables)), "--shard"))


@functools.cache
def _script(name):
    folder = "tests" if name in ("fault_campaign.py", "kill_sweep.py") else "scripts"
    if str(ROOT / "scripts") not in sys.path:
        sys.path.append(str(ROOT / "scripts"))  # where a script finds `installed`
    return runpy.run_path(str(ROOT / folder / name), run_name="bad-input")


def arguments(originals):
    """Words for the scripts that take no config."""

    def case(script, words, *names):
        def make(folder):
            given = [word.format(folder=folder, run=originals.run) for word in words]

            def go():
                parts = _script(script)
                _, values = cli.parse(given, parts["FLAGS"], config=False, arguments=parts.get("ARGUMENTS", ()))
                parts["run"](**values)

            return go

        return Case("arguments of scripts", f"{script} {' '.join(words)[:100]!r}", make, names)

    for script in ("evaluate.py", "sample.py", "what_if.py", "report.py", "export_hf.py", "prepare_data.py"):
        yield case(
            script, ["--unknown", "{run}", "{folder}/x"] if script != "prepare_data.py" else ["--unknown"], "--unknown"
        )
    for script in ("evaluate.py", "sample.py", "what_if.py", "report.py", "export_hf.py"):
        yield case(script, [], "is missing")
    for script in ("evaluate.py", "sample.py", "what_if.py"):
        yield case(script, ["{folder}/none"], "{folder}/none")
        yield case(script, ["{folder}"], "{folder}")
        yield case(script, ["a\0b"], "a")
        yield case(script, ["x" * 5000], "xxx")
        yield case(script, ["gs://bucket/run"], "gs:")
        for step in ("x", "1.5", "", "nan"):
            yield case(script, ["{run}", f"--step={step}"], "--step", step)
        yield case(script, ["{run}", "--step=-1"], "diagnostics.jsonl" if script == "what_if.py" else "-1")
        yield case(script, ["{run}", "--step=" + "9" * 400], "diagnostics.jsonl" if script == "what_if.py" else "999")
    yield case("evaluate.py", ["{run}", "--data_dir=x", "--tokens=y"], "--tokens")
    yield case("evaluate.py", ["{run}", "--tokens={folder}"], "{folder}")
    for name, values in {
        "num_samples": ("0", "-1", "x", "1.5"),
        "max_new_tokens": ("0", "-5", "x", "1e3"),
        "temperature": ("-1", "nan", "inf", "x", "1e999"),
        "top_k": ("-1", "257", "x"),
        "seed": ("-1", "2147483648", "x", "1.5"),
    }.items():
        for value in values:
            yield case("sample.py", ["{run}", f"--{name}={value}"], name, "inf" if value == "1e999" else value)
    yield case("sample.py", ["{run}", "--seed=2147483647", "--num_samples=2"], "2147483648")
    for words, *names in (
        (["{run}", "-o", "{folder}/out.pdf"], "out.pdf"),
        (["{run}", "-o", "{folder}"], "{folder}"),
        (["{run}", "--seconds=0"], "--seconds=0"),
        (["{run}", "--seconds=x"], "x"),
        (["{folder}/none", "-o", "{folder}/out.md"], "{folder}/none"),
        (["{run}", "-o", "/proc/x/out.md"], "/proc/x"),
        (["{run}", "-o", "{folder}/out.md", "--data=/proc/x"], "/proc/x"),
    ):
        yield case("report.py", words, *names)
    for words, *names in (
        (["{run}", "{run}"], "not an empty folder"),
        (["{folder}/none", "{folder}/out"], "{folder}/none"),
        (["--import", "{folder}/none", "{folder}/out"], "{folder}/none"),
        (["--import", "{run}", "{folder}/out"], "config.json"),
        (["--import", "{run}", "{folder}/out", "--step=1"], "--step"),
        (["{run}", "{folder}/out", "--tokenizer=gpt2"], "--tokenizer"),
        (["{run}", "{folder}/out", "--tokenizer=gpt3"], "gpt3"),
        (["{run}", "/proc/x/out"], "/proc/x"),
    ):
        yield case("export_hf.py", words, *names)
    for words, *names in (
        (["--source=moon"], "moon"),
        (["--tokenizer=moon"], "moon"),
        (["--input=a", "--source=sample"], "--source"),
        (["--split_seed=x", "--input={folder}"], "x"),
        (["--val_fraction=x", "--input={folder}"], "x"),
        (["--val_fraction=0", "--tokenizer=bytes", "--input=" + str(ROOT / "docs")], "0.0"),
        (["--input="], "--input"),
        (["--input={folder}", "--out=", "--tokenizer=bytes"], "--out"),
        (["--input={folder}/none.jsonl", "--tokenizer=bytes"], "none.jsonl"),
    ):
        yield case("prepare_data.py", words, *names)
    for words, *names in (
        (["--parts=kills,moon"], "moon"),
        (["--parts="], "--parts"),
        (["--kills=0"], "--kills=0"),
        (["--seed=-1"], "--seed=-1"),
        (["--soak_steps=x"], "x"),
        (["--budget_minutes=nan"], "nan"),
        (["--budget_minutes=-1"], "-1"),
        (["--budget_minutes=x"], "x"),
        (["--folder={run}/manifest.json"], "--folder"),
        (["--folder="], "--folder"),
        (["--folder=/proc/x"], "/proc/x"),
        (["--out={folder}/none/x.md"], "{folder}/none/x.md"),
        (["--out="], "--out"),
        (["--data_dir={folder}/none"], "{folder}/none"),
        (["--data_dir={folder}"], "{folder}"),
    ):
        yield case("fault_campaign.py", words, *names)
    for words, *names in (
        (["--kills=0"], "--kills=0"),
        (["--kills=501"], "--kills=501"),
        (["--kills=1.5"], "1.5"),
        (["--seed=x"], "x"),
        (["--data_dir={folder}/none"], "{folder}/none"),
        (["--data_dir="], "--data_dir"),
        (["moon"], "moon"),
    ):
        yield case("kill_sweep.py", words, *names)


def command_lines(originals):
    kind = "command lines"

    def case(what, make_words, *names, **limits):
        return Case(kind, what, lambda folder: Script(tuple(map(str, make_words(folder))), **limits), names)

    def train(what, *words, names, config=CONFIG):
        return case(
            f"train.py: {what}",
            lambda folder: [
                "train.py",
                config.format(folder=folder),
                *(word.format(folder=folder, tokens=originals.tokens) for word in words),
            ],
            *names,
        )

    yield train("a setting out of range", "--config.beta1=1.0", names=("beta1=1.0",))
    yield train("an infinite setting", "--config.learning_rate=1e999", names=("learning_rate=inf",))
    yield train("settings that contradict each other", "--config.n_head=3", names=("n_head=3", "n_embd"))
    yield train("no config file", names=("{folder}/no.py",), config="--config={folder}/no.py")
    yield train(
        "no data",
        "--data_dir={folder}/none",
        "--workdir={folder}/run",
        "--config.data_source=prepared",
        names=("{folder}/none",),
    )
    yield train(
        "a workdir where nothing can be made",
        "--data_dir={tokens}",
        "--workdir=/proc/altgrad",
        names=("/proc/altgrad",),
    )
    yield train(
        "too little data",
        "--data_dir={tokens}",
        "--workdir={folder}/run",
        "--config.block_size=4096",
        names=("block_size",),
    )
    yield train(
        "a checkpoint that is not there",
        "--data_dir={tokens}",
        "--workdir={folder}/run",
        "--resume=7",
        names=("--resume=7",),
    )

    def text(name, content, *words):
        return lambda folder: [
            "prepare_data.py",
            f"--input={write(folder / name, content)}",
            f"--out={folder}/out",
            "--tokenizer=bytes",
            *words,
        ]

    yield case("prepare_data.py: a broken line", text("a.jsonl", LINE + b"{\n"), "a.jsonl:2")
    yield case("prepare_data.py: bad UTF-8", text("a.jsonl", LINE + b"\xff\n"), "a.jsonl:2")
    yield case("prepare_data.py: an unknown kind", text("a.pkl", PICKLE), "a.pkl")
    yield case("prepare_data.py: val_fraction=nan", text("a.jsonl", LINE * 3, "--val_fraction=nan"), "nan")

    def fifo(folder):
        os.mkfifo(folder / "a.jsonl")
        return ["prepare_data.py", f"--input={folder}/a.jsonl", f"--out={folder}/out", "--tokenizer=bytes"]

    yield case("prepare_data.py: a fifo", fifo, "a.jsonl")

    def bomb(folder):
        # Files of gzip one behind the other are one: 4 GiB without the end of a line, in 4 MB.
        write(folder / "a.jsonl.gz", gzip.compress(b" " * 2**26) * 64)
        return ["prepare_data.py", f"--input={folder}/a.jsonl.gz", f"--out={folder}/out", "--tokenizer=bytes"]

    yield case(
        "prepare_data.py: 4 MB that unpack to 4 GiB in one line, with 2 GiB of memory",
        bomb,
        "longer than 256 MiB",
        memory=2**31,
    )
    yield case("prepare_data.py: a disk that is full", text("a.jsonl", LINE * 1000), "{folder}/out", file=2**14)

    def run(script, *words):
        return lambda folder: [script, *(word.format(folder=folder, run=originals.run) for word in words)]

    yield case("evaluate.py: no checkpoint", run("evaluate.py", "{folder}"), "{folder}")
    yield case("evaluate.py: no such step", run("evaluate.py", "{run}", "--step=7"), "step 7")
    yield case("evaluate.py: a step that is no number", run("evaluate.py", "{run}", "--step=x"), "--step", "x")
    yield case("sample.py: temperature=nan", run("sample.py", "{run}", "--temperature=nan"), "nan")
    yield case("sample.py: no arguments", run("sample.py"), "checkpoint")
    yield case("export_hf.py: a folder that is not empty", run("export_hf.py", "{run}", "{run}"), "empty folder")
    yield case(
        "export_hf.py --import: no model", run("export_hf.py", "--import", "{run}", "{folder}/out"), "config.json"
    )
    yield case("report.py: no run", run("report.py", "{folder}", "-o", "{folder}/out.html"), "{folder}")
    yield case(
        "report.py: a place that cannot be written", run("report.py", "{run}", "-o", "/proc/x/out.md"), "/proc/x"
    )
    yield case(
        "export_hf.py: a disk that is full", run("export_hf.py", "{run}", "{folder}/out"), "{folder}/out", file=2**11
    )
    yield case(
        "report.py: a disk that is full",
        run("report.py", "{run}", "-o", "{folder}/out.html"),
        "{folder}/out.html",
        file=2**11,
    )
    yield case("what_if.py: no histograms", run("what_if.py", "{run}"), "diagnostics.jsonl")
    yield case(
        "sweep.py: a name that leads outside",
        run("sweep.py", CONFIG, "--out={folder}/out", "--axes=run_name=../x"),
        "../x",
    )
    yield case("bench.py: no such suite", run("bench.py", CONFIG, "--suite=moon"), "moon")
    yield case(
        "make_format_docs.py: a place that cannot be written", run("make_format_docs.py", "--folder=/proc/x"), "/proc/x"
    )
    yield case("exhaustive_rounding.py: no such format", run("exhaustive_rounding.py", "--formats=E9M9"), "E9M9")


def cases(folder):
    """All cases of the catalogue, which keep what they copy in `folder`; nothing in it is drawn."""
    originals = Originals(folder)
    groups = (
        token_files,
        texts,
        archives,
        downloads,
        checkpoints,
        records,
        folders,
        rank_files,
        hf_folders,
        config_files,
        flags,
        arguments,
        command_lines,
    )
    return [case for group in groups for case in group(originals)]
