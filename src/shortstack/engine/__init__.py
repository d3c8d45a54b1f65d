"""Run a model one block at a time."""
