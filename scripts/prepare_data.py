"""Turns text into token files: train.bin, val.bin and meta.json.

python scripts/prepare_data.py                  # EURLEX57K, else (with a warning) the sample
python scripts/prepare_data.py --input acts.jsonl.gz --out data/acts
"""

import sys
from pathlib import Path

from altgrad_jax.cli import ArgumentParser, run_script, some_text, whole_number
from altgrad_jax.data import prepare, sources
from altgrad_jax.data.tokenizer import TOKENIZERS, get_tokenizer


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    add, either = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    either(
        "--source",
        choices=("auto", *sources.SOURCES),
        default="auto",
        help="a named corpus; auto (the default) is eurlex57k, or the small sample if that cannot be had",
    )
    either(
        "--input",
        metavar="PATH",
        type=some_text,
        help="local documents instead: JSONL (.gz, .zst), JSON, TXT, parquet, EURLEX57K's zip, a folder",
    )
    add("--out", metavar="DIR", type=some_text, help="where the token files go (default: data/<tokenizer>)")
    add("--tokenizer", choices=TOKENIZERS, default="gpt2", help="default: %(default)s")
    add("--text_field", metavar="NAME", type=some_text, help="the field of --input's records that holds the text")
    add(
        "--split_seed",
        type=whole_number,
        default=prepare.SPLIT_SEED,
        help="chooses the validation documents of a source without a split (default: %(default)s)",
    )
    add(
        "--val_fraction",
        type=float,
        default=prepare.VAL_FRACTION,
        help="their share of the documents (default: %(default)s)",
    )
    add(
        "--cache_dir",
        metavar="DIR",
        type=some_text,
        help=f"where downloads are kept (default: {sources.default_cache_dir()})",
    )
    add("--force", action="store_true", help="replace token files that are already in --out")
    return parser.parse_args(argv)


def main(args):
    data = prepare.prepare_source(
        Path(args.input) if args.input else args.source,
        args.out or Path("data") / args.tokenizer,
        get_tokenizer(args.tokenizer),
        text_field=args.text_field,
        split_seed=args.split_seed,
        val_fraction=args.val_fraction,
        cache_dir=args.cache_dir,
        force=args.force,
    )
    print(prepare.summary(data.dir, data.meta))
    if data.warnings:
        print(prepare.banner(data.warnings), file=sys.stderr)


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
