"""Train a pruned checkpoint until it is well again: LoRA, continued pretraining (CPT), distillation."""
