"""Backends that differentiate the log-likelihood of queries along directions in parameter space."""
