"""Width pruning: blocks with fewer attention heads and MLP channels, the baseline for the removal of whole blocks."""
