"""What a checkpoint is, whether it is sound, and which families are known."""
