"""Number formats, rounding, products, optimizers, ledger: pure functions of arrays; no config, no files."""
