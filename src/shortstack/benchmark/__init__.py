"""Latency, memory and utilisation of checkpoints in the engines that people run them with."""
