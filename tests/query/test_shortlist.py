"""Rows found by reading few of them, in a world of random errors with the covariance that the kernel says."""

import torch
from torch import Tensor

from hf_fwdattr.query.gaussian_process import GaussianProcess
from hf_fwdattr.query.shortlist import MOST, TURNS, search


ROWS = 300


class World:
    """Exact scores, what a first look says of them, and how often each row was read."""

    def __init__(self, seed: int, spread: float = 1.0):
        generator = torch.Generator().manual_seed(seed)
        factor = torch.randn(ROWS, 12, generator=generator, dtype=torch.float64)
        self.kernel = factor @ factor.T / 12 + 0.05 * torch.eye(ROWS, dtype=torch.float64)
        root = torch.linalg.cholesky(self.kernel)
        self.first = 2 * torch.randn(ROWS, generator=generator, dtype=torch.float64)
        off = root @ torch.randn(ROWS, generator=generator, dtype=torch.float64)
        self.exact = self.first + spread * off
        self.turns: list[int] = []

    def read(self, places: Tensor) -> Tensor:
        assert bool((places.diff() > 0).all())
        self.turns.append(len(places))
        half = self.exact[places] / 2
        return torch.stack([half, half])  # two output tokens


def found(world: World, kernel: Tensor | None, rows: int | None, count: int = 10) -> tuple[float, Tensor]:
    """Share of the ten best that are among those read, and the estimate."""
    learned = None if kernel is None else GaussianProcess(world.first, kernel)
    result = search(world.first, learned, count, rows, world.read)
    assert result.tokens.shape == (2, len(result.places))
    assert bool((result.places.diff() > 0).all())
    assert torch.equal(result.estimate[result.places], world.exact[result.places])
    best = set(world.exact.topk(count).indices.tolist())
    return len(best & set(result.places.tolist())) / count, result.estimate


def test_it_reads_what_it_was_allowed_in_turns() -> None:
    world = World(0)
    found(world, world.kernel, 36)
    assert world.turns == [9] * TURNS
    world = World(0)
    found(world, None, 36)
    assert world.turns == [36]


def test_so_many_are_read_on_either_side_in_any_case() -> None:
    world = World(0)
    found(world, world.kernel, 3, count=10)
    assert sum(world.turns) == 20
    world = World(0)
    found(world, world.kernel, 5000, count=10)
    assert sum(world.turns) == ROWS


def test_what_was_read_says_something_of_the_others() -> None:
    learnt, blind = [], []
    for seed in range(8):
        world = World(seed)
        learnt.append(found(world, world.kernel, 45))
        blind.append(found(World(seed), None, 45))
        assert float((learnt[-1][1] - world.exact).norm()) < 0.5 * float((blind[-1][1] - world.exact).norm())
    assert sum(share for share, _ in learnt) > sum(share for share, _ in blind)
    assert sum(share for share, _ in learnt) / 8 > 0.95


def test_certainty_is_kept_and_costs_what_it_must() -> None:
    shares, costs = [], []
    for seed in range(20):
        world = World(seed)
        shares.append(found(world, world.kernel, None, count=5)[0])
        costs.append(sum(world.turns))
    assert sum(shares) / len(shares) >= 0.98
    assert sum(costs) / len(costs) < 120
    sure = World(0, spread=0.0)  # a first look that is right is found out in one turn
    found(sure, sure.kernel, None, count=5)
    assert len(sure.turns) == 1
    unsure = World(0)
    found(unsure, torch.eye(ROWS, dtype=torch.float64), None, count=5)  # rows that say nothing of each other
    assert sum(costs[:1]) < sum(unsure.turns) <= MOST


def test_no_row_is_read_twice_and_none_is_invented() -> None:
    def read(places: Tensor) -> Tensor:
        return torch.zeros(1, len(places), dtype=torch.float64)

    result = search(torch.zeros(7), GaussianProcess(torch.zeros(7), torch.eye(7)), 2, 40, read)
    assert result.places.tolist() == list(range(7))
    for rows in (None, 40):
        assert len(search(torch.zeros(0), None, 2, rows, read).places) == 0


def test_rows_of_which_little_is_known_are_read_before_those_that_are_surely_close() -> None:
    world = World(0)
    world.first = torch.cat([torch.full((100,), 0.5), torch.zeros(100), torch.full((100,), -0.5)]).double()
    known, unknown = torch.full((100,), 1e-3), torch.full((100,), 4.0)
    spread = torch.cat([known, unknown, known]).double()
    world.exact = world.first + spread.sqrt() * torch.randn(300, generator=torch.Generator().manual_seed(1)).double()
    asked: list[Tensor] = []

    def read(places: Tensor) -> Tensor:
        asked.append(places)
        return world.read(places)

    search(world.first, GaussianProcess(world.first, spread.diag()), 4, 48, read)
    assert bool(((asked[0] < 100) | (asked[0] >= 200)).all())  # nothing is known of anything yet
    later = torch.cat(asked[1:])
    assert bool(((later >= 100) & (later < 200)).all())


def test_two_of_three_rows_that_are_read_are_proponents() -> None:
    world = World(0)
    result = search(world.first, None, 5, 36, world.read)
    expected = torch.cat([world.first.topk(24).indices, (-world.first).topk(12).indices])
    assert torch.equal(result.places, expected.sort().values)
