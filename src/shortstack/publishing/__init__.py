"""What a checkpoint and its results look like to others: the model card, and the push to the hub."""
