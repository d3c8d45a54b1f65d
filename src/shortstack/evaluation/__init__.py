"""What was lost: perplexity and sample continuations."""
