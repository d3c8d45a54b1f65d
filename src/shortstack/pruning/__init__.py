"""Plan which blocks to remove, remove them, and verify the result."""
