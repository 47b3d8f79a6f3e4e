"""What the passes will take is said before they begin."""

import sys
from dataclasses import replace

from torch import nn
from tqdm.auto import tqdm

from ..config import ResponseConfig
from ..models.likelihood import resolve_objective
from ..models.parameters import Parameters
from ..response.distributed import Ranks
from ..response.plan import Plan
from .fit_predictor import cost_of


def log_plan(
    config: ResponseConfig,
    model: nn.Module,
    parameters: Parameters,
    rows: int,
    keep: int,
    pace: float | None,
    ranks: Ranks,
    plan: Plan,
) -> None:
    """Say what the passes will take, with what follows them on rank 0."""
    if config.quiet or ranks.rank > 0:
        return
    if config.gradient_predictor and not config.private_rows:
        learned = plan.query_gradients and plan.chosen == rows and rows * parameters.size <= keep
        objective = resolve_objective(model, config.objective)
        look, size = cost_of(model, parameters, objective, rows, config.memory_budget, learned)
        plan = replace(plan, look=look, look_bytes=size)
    tqdm.write(f"response bank: {plan.summary(config.memory_budget, pace)}", file=sys.stderr)
