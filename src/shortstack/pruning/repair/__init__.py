"""Repair in closed form: what a cut changes in the hidden states is made good in the weights beside it."""
