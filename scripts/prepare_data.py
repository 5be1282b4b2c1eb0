"""Turns text into token files: train.bin, val.bin and meta.json.

python scripts/prepare_data.py                                    # EURLEX57K, else (with a warning) the
sample python scripts/prepare_data.py --input acts.jsonl.gz --out data/acts
"""

import argparse
import sys
from pathlib import Path

from altgrad_jax.data import prepare, sources
from altgrad_jax.data.tokenizer import TOKENIZERS, get_tokenizer
from altgrad_jax.errors import UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--source",
        choices=("auto", *sources.SOURCES),
        default="auto",
        help="a named corpus; auto (the default) is eurlex57k, or the small sample if that cannot be had",
    )
    where.add_argument(
        "--input",
        metavar="PATH",
        help="local documents: JSONL (.gz, .zst), JSON, TXT, parquet, EURLEX57K's zip, or a directory",
    )
    parser.add_argument("--out", metavar="DIR", help="where the token files go (default: data/<tokenizer>)")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="gpt2", help="default: %(default)s")
    parser.add_argument(
        "--text_field", metavar="NAME", help="the field of --input's records that holds the text"
    )
    parser.add_argument(
        "--split_seed",
        type=int,
        default=prepare.SPLIT_SEED,
        help="chooses the validation documents of a source without a split (default: %(default)s)",
    )
    parser.add_argument(
        "--val_fraction",
        type=float,
        default=prepare.VAL_FRACTION,
        help="their share of the documents (default: %(default)s)",
    )
    parser.add_argument(
        "--cache_dir",
        metavar="DIR",
        help=f"where downloads are kept (default: {sources.default_cache_dir()})",
    )
    parser.add_argument("--force", action="store_true", help="replace token files that are already in --out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        data = prepare.prepare_source(
            args.input or args.source,
            args.out or Path("data") / args.tokenizer,
            get_tokenizer(args.tokenizer),
            text_field=args.text_field,
            split_seed=args.split_seed,
            val_fraction=args.val_fraction,
            cache_dir=args.cache_dir,
            force=args.force,
        )
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(prepare.summary(data.dir, data.meta))
    if data.warnings:
        print(prepare.banner(data.warnings), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
