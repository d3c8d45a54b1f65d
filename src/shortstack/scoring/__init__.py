"""Measure how much each block matters."""
