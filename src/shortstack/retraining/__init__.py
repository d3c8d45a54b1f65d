"""Train a pruned checkpoint to recover its quality: LoRA, continued pretraining (CPT), distillation."""
