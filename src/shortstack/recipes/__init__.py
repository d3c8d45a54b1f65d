"""Recipes: pipelines as data. Stages with the parameters of their functions, validated before anything runs."""
