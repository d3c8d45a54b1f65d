"""The records that lie between stages, with their JSON: scores, plan, results, provenance."""
