"""Searches for the set of blocks that costs least when it goes, each set measured whole."""
