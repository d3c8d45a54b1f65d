"""Formatting, progress, JSON fields, extras: nothing here knows what a model is."""
