"""The demo page: checkpoints side by side, each writing the same prompt on, in a browser."""
