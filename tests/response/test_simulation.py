import math

import pytest
import torch
from torch import Tensor

from hf_fwdattr.gradients.per_sample import PerSampleGradients
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.models.modes import frozen
from hf_fwdattr.models.parameters import Parameters
from hf_fwdattr.response.curvature import Curvature
from hf_fwdattr.response.horizon import ExplicitHorizon
from hf_fwdattr.response.simulation import objective_gradient, simulate, simulate_rows
from tests.helpers.cases import Classifier, Quadratic, adapted, gpt2, padded, token_rows
from tests.helpers.reference import agree, exact_fisher, row_gradient


SETTINGS = dict(steps=12, step_size=0.15, damping=0.05)
GROUPS = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [1, 0, 1, 0, 1]])


def closed_form(factor: Tensor, pushes: Tensor) -> Tensor:
    return -Curvature(factor).apply(ExplicitHorizon(**SETTINGS).push, pushes)


@pytest.mark.parametrize("trajectories", [1, 2])
def test_simulation_at_the_minimum_is_the_closed_form(trajectories: int) -> None:
    world = Quadratic()
    theta = world.minimum()
    rows = world.gradients(theta)
    pushes = torch.stack([rows[0], rows[3], rows[[0, 3, 5]].sum(0)]) / world.rows
    simulated = [
        simulate(lambda at: world.gradients(at).mean(0), theta, push, trajectories=trajectories, **SETTINGS)  # type: ignore[arg-type]
        for push in pushes
    ]
    agree(torch.stack(simulated), closed_form(world.factor, pushes), 1e-8)


def test_away_from_the_minimum_only_two_trajectories_are_right() -> None:
    """With one, the way that training itself would still go counts as the row's doing."""
    world = Quadratic()
    theta = world.minimum() + 0.5
    push = world.gradients(theta)[0] / world.rows
    expected = closed_form(world.factor, push[None])[0]

    def simulated(trajectories: int) -> Tensor:
        return simulate(lambda at: world.gradients(at).mean(0), theta, push, trajectories=trajectories, **SETTINGS)  # type: ignore[arg-type]

    agree(simulated(2), expected, 1e-8)
    assert (simulated(1) - expected).norm() > 10 * expected.norm()


@pytest.mark.parametrize("epsilon", [1e-6, 1e-3, 1.0])
def test_the_size_of_the_nudge_does_not_matter_on_a_quadratic(epsilon: float) -> None:
    world = Quadratic()
    theta = world.minimum()
    push = world.gradients(theta)[0]
    simulated = simulate(lambda at: world.gradients(at).mean(0), theta, push, epsilon=epsilon, **SETTINGS)  # type: ignore[arg-type]
    agree(simulated, closed_form(world.factor, push[None])[0], 1e-8)


def test_rows_and_sources_of_a_model_in_batches() -> None:
    world = Classifier(rows=5, positions=2)
    parameters = Parameters.of(world.model, "trainable")
    before = parameters.read(world.model)
    batches = [{key: value[part] for key, value in world.batch.items()} for part in (slice(0, 3), slice(3, 5))]
    with frozen(world.model):
        simulated = simulate_rows(
            world.model, parameters, world.objective, batches, GROUPS.double(), epsilon=1e-4, **SETTINGS  # type: ignore[arg-type]
        )  # fmt: skip
    assert torch.equal(parameters.read(world.model), before)
    fisher = exact_fisher(world.model, parameters, world.objective, world.batch)
    values, vectors = torch.linalg.eigh(fisher)
    gradients, _ = PerSampleGradients(world.model, parameters, world.objective)(world.batch)
    pushes = GROUPS.double() @ gradients / world.tokens
    # Not a quadratic: training goes on from an arbitrary point, and the Hessian changes along the way.
    agree(simulated, closed_form((vectors * values.clamp(min=0).sqrt()).T, pushes), 0.1)
    agree(simulated[2], simulated[0] + simulated[1] + simulated_alone(world, parameters, batches, 4), 1e-6)


def simulated_alone(world: Classifier, parameters: Parameters, batches: list[dict[str, Tensor]], row: int) -> Tensor:
    line = torch.zeros(1, 5, dtype=torch.float64)
    line[0, row] = 1.0
    with frozen(world.model):
        return simulate_rows(world.model, parameters, world.objective, batches, line, epsilon=1e-4, **SETTINGS)[0]  # type: ignore[arg-type]


def test_gradient_of_the_objective_is_that_of_the_mean_token_loss() -> None:
    model = adapted(gpt2())
    parameters, rows = Parameters.of(model, "lora"), token_rows(5)
    batches = [padded(rows[:2]), padded(rows[2:])]
    theta = parameters.read(model) * 1.1
    flags = [parameter.requires_grad for parameter in model.parameters()]
    gradient = objective_gradient(model, parameters, CAUSAL_LM, batches)(theta)
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    batch = padded(rows)
    tokens = int((batch["labels"][:, 1:] >= 0).sum())
    agree(parameters.read(model), theta, 1e-12)
    agree(gradient, row_gradient(model, parameters, CAUSAL_LM, batch) / tokens, 1e-9)


def test_weights_come_back_when_a_simulation_fails() -> None:
    world = Classifier(rows=5)
    parameters = Parameters.of(world.model, "trainable")
    before = parameters.read(world.model)
    with frozen(world.model), pytest.raises(TypeError):
        simulate_rows(world.model, parameters, world.objective, [world.batch], GROUPS.double(), steps=1.5, step_size=1)  # type: ignore[arg-type]
    assert torch.equal(parameters.read(world.model), before)
    assert math.isfinite(float(before.norm()))
