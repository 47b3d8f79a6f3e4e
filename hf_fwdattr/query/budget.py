"""Budget of a query: the number of forward passes spent on naming rows."""

from typing import Literal

from ..bank.schema import Manifest
from ..errors import QueryError


__all__ = ["DEFAULT_PASSES", "Budget", "ResolvedBudget", "resolve_budget"]

ResolvedBudget = int | Literal["adaptive", "all"]
Budget = ResolvedBudget | None
DEFAULT_PASSES = 128  # where most queries have found all of their ten best rows; scripts measure the curve


def resolve_budget(manifest: Manifest, budget: Budget) -> ResolvedBudget:
    """Check a budget against a bank, and replace None by the bank's default.

    The default is 128 passes for a bank with at least as many directions that can estimate scores from fewer (it has
    row codes or a gradient predictor), and `all` otherwise.

    Returns:
        A number of forward passes, of which the first gives coarse scores of all rows; `adaptive`, to read rows until
        no other is likely to be among those named; or `all`, to read all of the bank's directions.

    Raises:
        ValueError: not a budget at all.
        QueryError: the bank does not hold what this budget needs.
    """
    estimates = bool(manifest.error_projections or manifest.error_variances)
    if budget is None:
        return DEFAULT_PASSES if estimates and manifest.directions >= DEFAULT_PASSES else "all"
    if budget == "all":
        return "all"
    if budget == "adaptive":
        if not manifest.error_variances:
            raise QueryError(
                "budget='adaptive': the bank does not hold row codes, so it cannot tell how certain a score is. Give "
                "a number of forward passes"
            )
        return "adaptive"
    if type(budget) is not int:
        raise ValueError(
            f"budget={budget!r}: neither a number of forward passes, nor 'adaptive' to read rows until no other is "
            "likely to be among those named, nor 'all' for all of the bank's directions"
        )
    if budget < 1:
        raise QueryError(f"budget={budget}: a query takes at least one forward pass")
    if estimates:
        return budget
    if budget < manifest.directions + 1:
        raise QueryError(
            f"budget={budget}: the bank holds neither row codes nor a gradient predictor, so a query takes a forward "
            f"pass for each of its {manifest.directions} directions. Leave budget out"
        )
    return "all"
