"""Files of other conventions, every instance that the tests draw from, and what becomes of each: a table.

python tests/conventions.py

"read": as it is meant. "refused": one sentence that names the file. "wrong": anything else, such as other tokens or
texts than those that were written.
"""

import itertools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import test_conventions as made

from altgrad_jax.data.dataset import load_token_data, open_token_file
from altgrad_jax.data.prepare import prepare_source
from altgrad_jax.data.sources import local
from altgrad_jax.data.tokenizer import get_tokenizer
from altgrad_jax.errors import UserError

TEXT = "".join(made.ALPHABETS) * 40 + "Article 1. The Council shall adopt 1,743 measures; they enter into force. " * 200


def token_files(where):
    for name, how in itertools.product(("gpt2", "bytes"), (*made.WRITERS, "characters", "text", "<u2")):
        tok = get_tokenizer(name)
        ids = np.append(tok.encode(TEXT), tok.eot)
        others = {"text": TEXT.encode(), "characters": made.characters(ids, TEXT), "<u2": ids.astype("<u2").tobytes()}
        data = others[how] if how in others else made.WRITERS[how](ids)
        for split in ("train.bin", "val.bin"):
            made.put(where / f"{name} {how}" / split, data)
        sizes = dict(vocab_size=50304, block_size=16, tokenizer=name)
        folder = where / f"{name} {how}"
        yield lambda: load_token_data(folder, **sizes).train_T.tolist(), ids.tolist(), f"{name} {how}"
        yield lambda: open_token_file(folder / "val.bin", **sizes).tolist(), ids.tolist(), f"{name} {how} --tokens"


def splits(where):
    subsets = [set(s) for n in (1, 2, 3) for s in itertools.combinations(made.WORDS, n)]
    for place, number, subset in itertools.product(made.PLACES, range(4), subsets):
        folder = where / f"{made.PLACES.index(place)} {number} {' '.join(sorted(subset))}"
        for split in subset:
            words = made.WORDS[split]
            path = folder / place.format(words[number % len(words)])
            line = json.dumps({"text": split}) + "\n"
            made.put(
                path, made.gzip.compress(line.encode()) if path.suffix == ".gz" else split if ".txt" in place else line
            )
        own = "validation" in subset
        expected = [("train" if own else None, "train"), ("validation", "validation")][: 1 + own]
        yield lambda: sorted(((d.split, d.text) for d in local(folder).documents()), key=str), expected, folder.name


def files_of_a_folder(where):
    for name, field in itertools.product(made.READ, made.FIELDS):
        rows = [{field: f"{name} {i}"} for i in range(3)]
        folder = made.put(where / field / name / name, made.READ[name](rows)).parent
        for other in made.SKIPPED:
            made.put(folder / other, b"\x89")
        named = sorted({other.split("/")[0] for other in made.SKIPPED})
        yield (
            lambda: ([d.text for d in local(folder).documents()], sorted(local(folder).skipped)),
            ([row[field] for row in rows], named),
            f"{name} {field}",
        )


def encodings(where):
    names = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")
    for text, encoding, kind in itertools.product(made.ALPHABETS, names, ("txt", "csv", "jsonl", "json")):
        rows = [{"text": text}] * 9
        written = {"txt": text, "csv": made.separated(rows, ","), "json": json.dumps(rows, ensure_ascii=False),
                   "jsonl": made.lines(rows, ensure_ascii=False)}[kind]  # fmt: skip
        path = made.put(where / f"{encoding}-{made.ALPHABETS.index(text)}.{kind}", written.encode(encoding))
        yield lambda: {d.text for d in local(path).documents()}, {text}, path.name


def own_tokenizers(where):
    for kind, separator in made.OWN:
        where.mkdir(parents=True, exist_ok=True)
        name = made.own_tokenizer(kind, where / f"{kind}{made.OWN.index((kind, separator))}.json", separator)
        tok = get_tokenizer(name)
        rows = [{"text": f"The Council shall adopt the budget {separator} " * (i + 1)} for i in range(30)]
        path = made.put(Path(name).with_suffix(".jsonl"), made.lines(rows))
        out = where / f"out {kind} {made.OWN.index((kind, separator))}"
        expected = sorted(i for row in rows for i in [*tok.encode(row["text"]).tolist(), tok.eot])

        def read(path=path, out=out, tok=tok, name=name):
            prepare_source(path, out, tok, progress=False)
            data = load_token_data(out, vocab_size=tok.vocab_size, block_size=8, tokenizer=name)
            return sorted([*data.train_T.tolist(), *data.val_T.tolist()])

        yield read, expected, f"{kind} {separator}"


def main():
    print("| kind | instances | read | refused | wrong |\n|---|---|---|---|---|")
    for kind in (token_files, splits, files_of_a_folder, encodings, own_tokenizers):
        counts, wrong = {"read": 0, "refused": 0, "wrong": 0}, []
        where = Path(tempfile.mkdtemp(prefix="conventions-"))
        for read, expected, what in kind(where):
            try:
                outcome = "read" if read() == expected else "wrong"
            except UserError:
                outcome = "refused"
            except Exception as error:
                outcome, what = "wrong", f"{what}: {error!r}"
            counts[outcome] += 1
            wrong += [what] * (outcome == "wrong")
        shutil.rmtree(where)
        print(
            f"| {kind.__name__.replace('_', ' ')} | {sum(counts.values())} | {' | '.join(map(str, counts.values()))} |"
        )
        for what in wrong:
            print("wrong:", what)


if __name__ == "__main__":
    main()
