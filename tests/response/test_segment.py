import torch
from torch import Tensor

from hf_fwdattr.response.curvature import Curvature
from hf_fwdattr.response.horizon import NaturalHorizon
from hf_fwdattr.response.segment import Segment, Visits
from tests.helpers.reference import agree, flow


SIZE, ROWS = 7, 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def segment(seed: int = 0, tau: float = 0.6, samples: int = 4, weight_decay: float = 0.1) -> Segment:
    diagonal = 0.2 + drawn(SIZE, seed=seed).square()
    factor = drawn(samples, SIZE, seed=seed + 100) * diagonal.sqrt()
    row_weights = torch.tensor([0.3, 0.0, 0.7, 0.1], dtype=torch.float64)
    made = Segment(torch.zeros(SIZE, dtype=torch.float64), diagonal, NaturalHorizon(tau), row_weights, weight_decay)
    made.curvature = Curvature(factor, weight_decay)
    return made


def matrix(made: Segment) -> Tensor:
    """Return D (H + w D^-1), which multiplies the parameters' deviation in optimizer time; not symmetric."""
    assert made.curvature is not None
    root = made.diagonal.sqrt()
    tilde = made.curvature.factor.T @ made.curvature.factor + made.weight_decay * torch.eye(SIZE, dtype=torch.float64)
    return root[:, None] * tilde / root


def test_propagate_solves_the_differential_equation() -> None:
    """dr/dt = -D (H + w/D) r - D g, the flow of a preconditioned optimizer with decoupled decay."""
    one = segment()
    earlier, pushes = drawn(ROWS, SIZE, seed=1), drawn(ROWS, SIZE, seed=2)
    agree(one.propagate(earlier, pushes), flow(matrix(one), one.diagonal * pushes, earlier, 0.6), 1e-9)
    nothing = torch.zeros(ROWS, SIZE, dtype=torch.float64)
    agree(one.propagate(None, pushes), flow(matrix(one), one.diagonal * pushes, nothing, 0.6), 1e-9)


def test_segments_compose_like_flows() -> None:
    run = [segment(seed, tau) for seed, tau in ((0, 0.6), (1, 0.2), (2, 1.1))]
    pushes = [drawn(ROWS, SIZE, seed=seed) for seed in (3, 4, 5)]
    response, expected = None, torch.zeros(ROWS, SIZE, dtype=torch.float64)
    for one, push in zip(run, pushes, strict=True):
        response = one.propagate(response, push)
        expected = flow(matrix(one), one.diagonal * push, expected, one.horizon.length)
    assert response is not None
    agree(response, expected, 1e-10)


def test_splitting_a_segment_does_not_change_responses() -> None:
    push = drawn(ROWS, SIZE, seed=1)
    whole = segment(tau=0.6).propagate(None, push)
    agree(segment(tau=0.4).propagate(segment(tau=0.2).propagate(None, push), push), whole, 1e-10)


def test_visits_push_when_they_happen() -> None:
    """A row's push is what its step multiplied the gradient with, and decays from there to the segment's end."""
    one = segment(tau=0.6)
    rows, rates = torch.tensor([2, 0, 2, 1, 2]), torch.tensor([0.1, 0.2, 0.1, 0.1, 0.1], dtype=torch.float64)
    remaining = 0.6 - rates.cumsum(0)
    visits = Visits(rows, torch.arange(5), rates, remaining)
    gradients, earlier = drawn(5, SIZE, seed=3), drawn(ROWS, SIZE, seed=4)
    expected = (torch.linalg.matrix_exp(-0.6 * matrix(one)) @ earlier.T).T
    for row, gradient, rate, left in zip(rows, gradients, rates, remaining, strict=True):
        expected[row] -= torch.linalg.matrix_exp(-left * matrix(one)) @ (one.diagonal * gradient) * rate
    agree(one.propagate_visits(earlier, gradients, visits, rows), expected, 1e-10)


def test_visits_of_rows_are_found() -> None:
    visits = Visits(torch.tensor([2, 0, 2, 1, 2]), torch.arange(10, 15), torch.ones(5), torch.arange(5.0))
    found, lines = visits.of(torch.tensor([2, 5, 0]))
    assert found.captured.tolist() == [10, 12, 14, 11]
    assert found.remaining.tolist() == [0.0, 2.0, 4.0, 1.0]
    assert lines.tolist() == [0, 0, 0, 2]


def test_adjoint_is_the_adjoint_of_propagate() -> None:
    run = [segment(seed, tau) for seed, tau in ((0, 0.6), (1, 0.2), (2, 1.1))]
    pushes = [drawn(ROWS, SIZE, seed=seed) for seed in (3, 4, 5)]
    vectors = drawn(3, SIZE, seed=6)
    response = None
    for one, push in zip(run, pushes, strict=True):
        response = one.propagate(response, push)
    assert response is not None
    products, adjoint = torch.zeros(3, ROWS, dtype=torch.float64), vectors
    for one, push in zip(reversed(run), reversed(pushes), strict=True):
        on_pushes, adjoint = one.adjoint(adjoint)
        products += on_pushes @ push.T
    agree(products, vectors @ response.T, 1e-10)


def test_responses_are_linear_in_pushes() -> None:
    run = [segment(0), segment(1)]

    def response(pushes: Tensor) -> Tensor:
        return run[1].propagate(run[0].propagate(None, pushes), pushes)

    a, b = drawn(ROWS, SIZE, seed=1), drawn(ROWS, SIZE, seed=2)
    agree(response(a + 3 * b), response(a) + 3 * response(b), 1e-12)
    agree(response(a.sum(0, keepdim=True)), response(a).sum(0, keepdim=True), 1e-12)


def test_unseen_rows_have_exactly_zero_responses() -> None:
    run = [segment(0), segment(1)]
    response = None
    for one in run:
        response = one.propagate(response, drawn(ROWS, SIZE) * one.row_weights[:, None])
    assert response is not None
    assert torch.equal(response[1], torch.zeros(SIZE, dtype=torch.float64))
    assert response[[0, 2, 3]].norm(dim=1).min() > 0


def test_response_without_curvature_is_the_preconditioned_gradient() -> None:
    one = segment(samples=0, weight_decay=0.0)
    push = drawn(ROWS, SIZE)
    agree(one.propagate(None, push), -0.6 * one.diagonal * push, 1e-12)
