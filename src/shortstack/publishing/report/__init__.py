"""A report of what was done to a model and what it cost: one HTML file, made from the records that lie between stages."""
