"""Run by the Pythons of engines. Alone in its folder: there a script looks for `vllm` and `transformers` first."""
