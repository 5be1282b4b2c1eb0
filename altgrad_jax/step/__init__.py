"""What is traced and compiled: one update, its metrics and monitor, and the program of a run."""
