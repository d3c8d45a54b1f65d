"""Store the weights of a checkpoint in fewer bits: GPTQ and simpler schemes, through llm-compressor."""
