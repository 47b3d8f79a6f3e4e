"""Gaussian process against the textbook's conditional distribution over all rows, and its laws."""

import pytest
import torch
from torch import Tensor

from hf_fwdattr.query.gaussian_process import CandidateScores, GaussianProcess
from tests.helpers.reference import agree


ROWS, K = 9, 4
NUGGET = 1e-4


class World:
    """Rows with coordinates and parts outside the directions; the dense covariance of what remains of their scores."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self.variances = torch.rand(K, generator=generator, dtype=torch.float64) + 0.1
        self.coordinates = torch.randn(ROWS, K, generator=generator, dtype=torch.float64)
        self.own = torch.rand(ROWS, generator=generator, dtype=torch.float64)
        self.predicted, self.scores = torch.randn(2, ROWS, generator=generator, dtype=torch.float64)
        self.covariance = (self.coordinates * self.variances) @ self.coordinates.T + self.own.diag()

    def candidates(self, scale: float = 1.0) -> CandidateScores:
        process = GaussianProcess(scale * self.variances)
        return CandidateScores(process, self.predicted, self.coordinates, scale * self.own)

    def conditional(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of what rows share, and variance of all scores but the observed ones' own parts, given these rows."""
        gram = self.covariance[observed][:, observed]
        gram = gram + NUGGET * gram.diagonal().mean() * torch.eye(len(observed), dtype=torch.float64)
        shared = (self.coordinates * self.variances) @ self.coordinates.T
        residuals = (self.scores - self.predicted)[observed]
        mean = self.predicted + shared[:, observed] @ torch.linalg.solve(gram, residuals)
        left = self.covariance - shared[:, observed] @ torch.linalg.inv(gram) @ shared[observed]
        scale = residuals @ torch.linalg.solve(gram, residuals) / len(observed)
        return mean, scale * left.diagonal()


OBSERVED = torch.tensor([6, 1, 3])


def test_rows_are_those_of_the_conditional_distribution() -> None:
    world = World()
    candidates = world.candidates()
    assert torch.equal(candidates.mean(), world.predicted)
    assert bool(candidates.std().isinf().all())
    candidates.observe_rows(OBSERVED, world.scores[OBSERVED])
    mean, variance = world.conditional(OBSERVED)
    agree(candidates.mean(), mean, 1e-9)
    agree(candidates.std().square(), variance, 1e-9)
    assert candidates.process.observations == 3


def test_directions_are_rows_without_a_part_outside() -> None:
    world = World()
    world.coordinates[0], world.own[0], world.predicted[0] = torch.eye(K)[2].double(), 0.0, 0.0
    world.covariance = (world.coordinates * world.variances) @ world.coordinates.T + world.own.diag()
    by_direction, by_row = world.candidates(), world.candidates()
    by_direction.process.observe(torch.eye(K)[2:3], world.scores[:1], torch.zeros(1))
    by_row.observe_rows(torch.tensor([0]), world.scores[:1])
    agree(by_direction.mean(), by_row.mean(), 1e-12)
    expected = torch.zeros(K, dtype=torch.float64)
    expected[2] = world.scores[0] / (1 + NUGGET)
    agree(by_direction.process.mean(), expected, 1e-9)


def test_observations_in_turns_equal_observations_at_once() -> None:
    world = World()
    at_once, in_turns = world.candidates(), world.candidates()
    at_once.observe_rows(OBSERVED, world.scores[OBSERVED])
    for row in (1, 6, 3):
        in_turns.observe_rows(torch.tensor([row]), world.scores[[row]])
    agree(in_turns.mean(), at_once.mean(), 1e-9)
    assert at_once.surprise == 1.0
    agree(in_turns.std() / in_turns.surprise, at_once.std(), 1e-9)


def test_deviations_grow_with_what_readings_have_shown() -> None:
    world = World()
    candidates = world.candidates()
    candidates.observe_rows(OBSERVED, world.scores[OBSERVED])
    before, expected = candidates.std()[[0, 8]], candidates.mean()[[0, 8]]
    assert candidates.surprise == 1.0
    candidates.observe_rows(torch.tensor([0, 8]), expected + torch.tensor([3.0, -4.0]) * before)
    assert candidates.surprise == pytest.approx(12.5**0.5)
    agree(candidates.std(), candidates.process.std(world.coordinates, world.own) * 12.5**0.5, 1e-12)


@pytest.mark.parametrize("scale", [1e-3, 5.0])
def test_scale_of_the_variances_does_not_matter(scale: float) -> None:
    world = World()
    usual, rescaled = world.candidates(), world.candidates(scale)
    for candidates in (usual, rescaled):
        candidates.observe_rows(OBSERVED, world.scores[OBSERVED])
    agree(rescaled.mean(), usual.mean(), 1e-6)
    agree(rescaled.std(), usual.std(), 1e-6)
    assert rescaled.process.scale() == pytest.approx(usual.process.scale() / scale)


def test_uncorrelated_rows_keep_what_is_predicted() -> None:
    world = World()
    world.coordinates[:3, 2:] = world.coordinates[3:, :2] = 0.0
    candidates = world.candidates()
    candidates.observe_rows(torch.tensor([0, 2]), torch.tensor([5.0, -5.0]))
    found = candidates.mean()
    agree(found[3:], world.predicted[3:], 1e-12)
    assert float((found[:3] - world.predicted[:3]).abs().min()) > 0


def test_zero_variances_change_nothing() -> None:
    candidates = CandidateScores(GaussianProcess(torch.zeros(2)), torch.ones(3), torch.ones(3, 2), torch.zeros(3))
    candidates.observe_rows(torch.tensor([1]), torch.tensor([7.0]))
    assert torch.equal(candidates.mean(), torch.ones(3, dtype=torch.float64))


def test_narrowed_candidates_learn_with_the_others() -> None:
    world = World()
    candidates, rows = world.candidates(), torch.tensor([1, 3, 6, 8])
    narrowed = candidates.narrowed(rows)
    narrowed.observe_rows(torch.tensor([0, 1]), world.scores[rows[:2]])
    alone = world.candidates()
    alone.observe_rows(rows[:2], world.scores[rows[:2]])
    agree(candidates.mean(), alone.mean(), 1e-12)
    agree(narrowed.std(), alone.std()[rows], 1e-12)


def test_expected_derivatives_are_the_mean_before_any_observation() -> None:
    """As a process of mean zero over what remains of the scores beyond the expected ones."""
    world = World()
    expected = torch.arange(K).double() - 1.0
    shifted = CandidateScores(
        GaussianProcess(world.variances, expected), world.predicted, world.coordinates, world.own
    )
    agree(shifted.mean(), world.predicted + world.coordinates @ expected, 1e-12)
    world.predicted = world.predicted + world.coordinates @ expected
    plain = world.candidates()
    for candidates in (shifted, plain):
        candidates.observe_rows(OBSERVED, world.scores[OBSERVED])
    agree(shifted.mean(), plain.mean(), 1e-9)
    agree(shifted.std(), plain.std(), 1e-9)
