"""Gradients predicted from a single forward pass, for a first look at every row of a bank."""
