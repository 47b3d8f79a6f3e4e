"""Errors of this package, one class per cure. Every message names what is wrong, its value, why, and what to do."""

__all__ = ["AttributionError", "BankError", "MismatchError", "NumericalError", "QueryError", "UnsupportedError"]


class AttributionError(Exception):
    """Base of every error that this package raises on purpose."""


class UnsupportedError(AttributionError):
    """A model, an optimizer or a setting outside the mathematics; no score would be right."""


class QueryError(AttributionError, ValueError):
    """A query or a dataset that cannot be scored: nothing supervised, too long, empty."""


class NumericalError(AttributionError, ArithmeticError):
    """A value that is not finite, or digits that the arithmetic does not have."""


class BankError(AttributionError):
    """A bank that cannot be trusted: missing, edited, truncated, of another schema."""


class MismatchError(BankError):
    """A sound bank that belongs to another model or another dataset."""
