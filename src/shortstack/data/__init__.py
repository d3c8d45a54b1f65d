"""Texts, rows and data sets: where they come from, and how they become windows, examples and batches."""
