"""The table of model families, its rules, and the probe of a family that the table does not know.

What a row cannot say in data is a small named function that it points at, tested against transformers' AutoConfig. A
module per kind:

- lists: write out a per-block list that a config only implies by a rule;
- rewrites: re-derive the entries that hold block numbers or counts, for the blocks that stay;
- refusals: why a set of blocks cannot go exactly;
- tensors: what few families need of their tensors beyond dropping and renumbering.
"""
