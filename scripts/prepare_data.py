"""Turns text into token files: train.bin, val.bin and meta.json.

python scripts/prepare_data.py                  # EURLEX57K, else (with a warning) the sample
python scripts/prepare_data.py --input acts.jsonl.gz --out data/acts
"""

import sys
from pathlib import Path

import installed  # noqa: F401
from absl import flags

from altgrad_jax import cli
from altgrad_jax.data import prepare, sources
from altgrad_jax.data.tokenizer import get_tokenizer, tokenizer_name
from altgrad_jax.errors import UserError

FLAGS = cli.new_flags()
SOME_TEXT = cli.Parser(str, "some text")
flags.DEFINE_enum(
    "source",
    None,
    ("auto", *sources.SOURCES),
    "a named corpus; auto (the default) is eurlex57k, or the small sample if that cannot be had",
    flag_values=FLAGS,
)
flags.DEFINE(
    SOME_TEXT,
    "input",
    None,
    "local documents instead: JSONL, JSON, CSV, TXT, parquet, Arrow, EURLEX57K's zip, a folder (docs/your_data.md)",
    flag_values=FLAGS,
)
flags.DEFINE(SOME_TEXT, "out", None, "folder where the token files go (default: data/TOKENIZER)", flag_values=FLAGS)
flags.DEFINE(
    SOME_TEXT, "tokenizer", "gpt2", "gpt2, bytes, or the path of a tokenizer.json of your own", flag_values=FLAGS
)
flags.DEFINE(SOME_TEXT, "text_field", None, "the field of --input's records that holds the text", flag_values=FLAGS)
flags.DEFINE_bool(
    "split_names",
    True,
    "whether names such as train, dev and test in --input's folder tell the split",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "split_seed", prepare.SPLIT_SEED, "chooses the validation documents of a source without a split", flag_values=FLAGS
)
flags.DEFINE_float("val_fraction", prepare.VAL_FRACTION, "their share of the documents", flag_values=FLAGS)
flags.DEFINE(
    SOME_TEXT,
    "cache_dir",
    None,
    f"folder where downloads are kept (default: {sources.default_cache_dir()})",
    flag_values=FLAGS,
)
flags.DEFINE_bool("force", False, "replace token files that are already in --out", flag_values=FLAGS)


def run(*, source, input, out, tokenizer, **options):
    if source is not None and input is not None:
        raise UserError(f"--source={source} and --input={input} name two sources of text: give one of them")
    data = prepare.prepare_source(
        Path(input) if input else source or "auto",
        out or Path("data") / tokenizer_name(tokenizer),
        get_tokenizer(tokenizer),
        **options,
    )
    print(prepare.summary(data.dir, data.meta, data.skipped))
    if data.warnings:
        print(prepare.banner(data.warnings), file=sys.stderr)


if __name__ == "__main__":
    cli.main(run, FLAGS, usage=__doc__)
