"""Published block orders and figures, by name."""
