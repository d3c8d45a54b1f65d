"""What lies on disk: config, headers, bytes, names. Nothing here imports torch."""
