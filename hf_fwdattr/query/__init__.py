"""Scores of training rows and sources for queries."""
