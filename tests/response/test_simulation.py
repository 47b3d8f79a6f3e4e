import pytest
import torch
from torch import Tensor, nn

from hf_fwdattr.gradients.per_sample import PerSampleGradients
from hf_fwdattr.models.likelihood import CAUSAL_LM, Batch, Objective
from hf_fwdattr.models.modes import frozen
from hf_fwdattr.models.parameters import TrackedParameters
from hf_fwdattr.response.curvature import Curvature
from hf_fwdattr.response.horizon import ExplicitHorizon
from hf_fwdattr.response.simulation import objective_gradient, simulate, simulate_rows
from tests.helpers.cases import Classifier, Quadratic, adapted, gpt2, padded, token_rows
from tests.helpers.reference import agree, exact_fisher, row_gradient


HORIZON = ExplicitHorizon(12, 0.15, 0.05)
GROUPS = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [1, 0, 1, 0, 1]])


def closed_form(factor: Tensor, pushes: Tensor) -> Tensor:
    return -Curvature(factor).apply(HORIZON.push, pushes)


@pytest.mark.parametrize("trajectories", [1, 2])
def test_simulation_at_the_minimum_equals_the_closed_form(trajectories: int) -> None:
    world = Quadratic()
    theta = world.minimum()
    rows = world.gradients(theta)
    pushes = torch.stack([rows[0], rows[3], rows[[0, 3, 5]].sum(0)]) / world.rows
    simulated = [
        simulate(lambda at: world.gradients(at).mean(0), theta, push, HORIZON, trajectories=trajectories)
        for push in pushes
    ]
    agree(torch.stack(simulated), closed_form(world.factor, pushes), 1e-8)


def test_simulation_off_the_minimum_needs_two_trajectories() -> None:
    """With one, the steps that training itself would still take are attributed to the row."""
    world = Quadratic()
    theta = world.minimum() + 0.5
    push = world.gradients(theta)[0] / world.rows
    expected = closed_form(world.factor, push[None])[0]

    def simulated(trajectories: int) -> Tensor:
        return simulate(lambda at: world.gradients(at).mean(0), theta, push, HORIZON, trajectories=trajectories)

    agree(simulated(2), expected, 1e-8)
    assert (simulated(1) - expected).norm() > 10 * expected.norm()


@pytest.mark.parametrize("epsilon", [1e-6, 1e-3, 1.0])
def test_epsilon_does_not_matter_on_a_quadratic(epsilon: float) -> None:
    world = Quadratic()
    theta = world.minimum()
    push = world.gradients(theta)[0]
    simulated = simulate(lambda at: world.gradients(at).mean(0), theta, push, HORIZON, epsilon=epsilon)
    agree(simulated, closed_form(world.factor, push[None])[0], 1e-8)


def test_simulated_rows_and_sources_are_near_the_closed_form() -> None:
    world = Classifier(rows=5, positions=2)
    parameters = TrackedParameters.of(world.model, "trainable")
    before = parameters.read(world.model)
    batches = [{key: value[part] for key, value in world.batch.items()} for part in (slice(0, 3), slice(3, 5))]
    with frozen(world.model):
        simulated = simulate_rows(
            world.model, parameters, world.objective, batches, GROUPS.double(), HORIZON, epsilon=1e-4
        )
    assert torch.equal(parameters.read(world.model), before)
    fisher = exact_fisher(world.model, parameters, world.objective, world.batch)
    values, vectors = torch.linalg.eigh(fisher)
    gradients, _ = PerSampleGradients(world.model, parameters, world.objective)(world.batch)
    pushes = GROUPS.double() @ gradients / world.tokens
    # Not a quadratic: training goes on from an arbitrary point, and the Hessian changes along the way.
    agree(simulated, closed_form((vectors * values.clamp(min=0).sqrt()).T, pushes), 0.1)
    agree(simulated[2], simulated[0] + simulated[1] + simulated_alone(world, parameters, batches, 4), 1e-6)


def simulated_alone(
    world: Classifier, parameters: TrackedParameters, batches: list[dict[str, Tensor]], row: int
) -> Tensor:
    line = torch.zeros(1, 5, dtype=torch.float64)
    line[0, row] = 1.0
    with frozen(world.model):
        return simulate_rows(world.model, parameters, world.objective, batches, line, HORIZON, epsilon=1e-4)[0]


def test_objective_gradient_is_that_of_the_mean_token_loss() -> None:
    model = adapted(gpt2())
    parameters, rows = TrackedParameters.of(model, "lora"), token_rows(5)
    batches = [padded(rows[:2]), padded(rows[2:])]
    theta = parameters.read(model) * 1.1
    flags = [parameter.requires_grad for parameter in model.parameters()]
    gradient = objective_gradient(model, parameters, CAUSAL_LM, batches)(theta)
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    batch = padded(rows)
    tokens = int((batch["labels"][:, 1:] >= 0).sum())
    agree(parameters.read(model), theta, 1e-12)
    agree(gradient, row_gradient(model, parameters, CAUSAL_LM, batch) / tokens, 1e-9)


def test_weights_are_restored_after_a_failed_simulation() -> None:
    world = Classifier(rows=5)
    parameters = TrackedParameters.of(world.model, "trainable")
    before = parameters.read(world.model)

    def failing(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        if not torch.equal(parameters.read(model), before):
            raise KeyboardInterrupt
        return world.objective.forward(model, batch)

    objective = Objective("custom", failing)
    with frozen(world.model), pytest.raises(KeyboardInterrupt):
        simulate_rows(world.model, parameters, objective, [world.batch], GROUPS.double(), HORIZON)
    assert torch.equal(parameters.read(world.model), before)
