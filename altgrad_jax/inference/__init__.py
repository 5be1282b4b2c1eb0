"""What reads a finished checkpoint: sampling, evaluation, interchange."""
