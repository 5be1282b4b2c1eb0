"""The host's side of a run: record, checkpoints, loop, sweeps, console, verdict."""
