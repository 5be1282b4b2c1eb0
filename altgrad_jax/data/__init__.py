"""Text in, token windows out: tokenizer -> sources -> prepare -> dataset."""
