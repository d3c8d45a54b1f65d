"""What a checkpoint and its results look like to others: the model card."""
