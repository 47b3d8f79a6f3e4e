"""What can go wrong, one class per cure. Every message names what, where and what to do."""


class AttributionError(Exception):
    """Base of every error that this package raises on purpose."""


class UnsupportedError(AttributionError):
    """The model, the optimizer or a setting is outside what the mathematics covers; no score would be right."""


class QueryError(AttributionError, ValueError):
    """A query or a dataset that cannot be scored: nothing supervised, too long, empty."""


class NumericalError(AttributionError, ArithmeticError):
    """A value that is not finite, or digits that the arithmetic does not have."""


class BankError(AttributionError):
    """A bank that cannot be trusted: missing, edited, truncated, of another schema."""


class MismatchError(BankError):
    """A sound bank that belongs to another model or another dataset than the one at hand."""
