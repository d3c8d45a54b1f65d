"""What lies on disk: families, headers, bytes, provenance. Nothing here imports torch."""
