"""Text to packed token batches: sources -> tokenizer -> pack -> batches. Knows no model and imports no torch."""
