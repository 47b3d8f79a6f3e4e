"""Rows found by reading few of them, in a world of random errors with a known covariance."""

import torch
from torch import Tensor

from hf_fwdattr.query.gaussian_process import CandidateScores, GaussianProcess
from hf_fwdattr.query.shortlist import MOST, TURNS, _shares, refine


ROWS = 300


class World:
    """Exact scores, coarse scores, and the number of rows read in each turn."""

    def __init__(self, seed: int, spread: float = 1.0):
        generator = torch.Generator().manual_seed(seed)
        factor = torch.randn(ROWS, 12, generator=generator, dtype=torch.float64)
        self.coordinates, self.own = factor / 12**0.5, torch.full((ROWS,), 0.05, dtype=torch.float64)
        self.coarse = 2 * torch.randn(ROWS, generator=generator, dtype=torch.float64)
        errors = self.coordinates @ torch.randn(12, generator=generator, dtype=torch.float64)
        errors += self.own.sqrt() * torch.randn(ROWS, generator=generator, dtype=torch.float64)
        self.exact = self.coarse + spread * errors
        self.turns: list[int] = []

    def process(self) -> CandidateScores:
        return CandidateScores(GaussianProcess(torch.ones(12)), self.coarse, self.coordinates, self.own)

    def read(self, row_indices: Tensor) -> Tensor:
        assert bool((row_indices.diff() > 0).all())
        self.turns.append(len(row_indices))
        half = self.exact[row_indices] / 2
        return torch.stack([half, half])  # two output tokens


def refined(
    world: World, process: CandidateScores | None, budget: int | None, top_k: int = 10
) -> tuple[float, Tensor]:
    """Return the share of the best rows that are read, and the refined scores."""
    result = refine(world.coarse, process, top_k, budget, world.read)
    assert result.token_scores.shape == (2, len(result.row_indices))
    assert bool((result.row_indices.diff() > 0).all())
    assert torch.equal(result.scores[result.row_indices], world.exact[result.row_indices])
    best = set(world.exact.topk(top_k).indices.tolist())
    return len(best & set(result.row_indices.tolist())) / top_k, result.scores


def test_budget_is_spent_in_turns() -> None:
    world = World(0)
    refined(world, world.process(), 36)
    assert world.turns == [9] * TURNS
    world = World(0)
    refined(world, None, 36)
    assert world.turns == [36]


def test_top_k_rows_are_read_on_either_side_whatever_the_budget() -> None:
    world = World(0)
    refined(world, world.process(), 3, top_k=10)
    assert sum(world.turns) == 20
    world = World(0)
    refined(world, world.process(), 5000, top_k=10)
    assert sum(world.turns) == ROWS


def test_top_k_rows_of_a_side_without_chances_are_read() -> None:
    """Opponents are all alike and far from zero, so that every chance is a proponent's."""
    world = World(0)
    world.coarse[:150] += 100.0
    world.exact[:150] += 100.0
    result = refine(world.coarse, world.process(), 10, 40, world.read)
    assert int((result.row_indices >= 150).sum()) >= 10


def test_no_row_need_be_named() -> None:
    for budget in (8, None):
        world = World(0)
        result = refine(world.coarse, world.process(), 0, budget, world.read)
        assert result.scores.shape == (ROWS,)


def test_exact_scores_improve_the_others() -> None:
    informed, blind = [], []
    for seed in range(8):
        world = World(seed)
        informed.append(refined(world, world.process(), 45))
        blind.append(refined(World(seed), None, 45))
        assert float((informed[-1][1] - world.exact).norm()) < 0.5 * float((blind[-1][1] - world.exact).norm())
    assert sum(share for share, _ in informed) > sum(share for share, _ in blind)
    assert sum(share for share, _ in informed) / 8 > 0.95


def test_adaptive_budget_stops_when_the_best_rows_are_certain() -> None:
    shares, costs = [], []
    for seed in range(20):
        world = World(seed)
        shares.append(refined(world, world.process(), None, top_k=5)[0])
        costs.append(sum(world.turns))
    assert sum(shares) / len(shares) >= 0.98
    assert sum(costs) / len(costs) < 120
    certain = World(0, spread=0.0)  # coarse scores without errors take one turn
    refined(certain, certain.process(), None, top_k=5)
    assert len(certain.turns) == 1
    uncertain = World(0)
    uncertain.coordinates, uncertain.own = torch.zeros(ROWS, 12).double(), torch.ones(ROWS)
    refined(uncertain, uncertain.process(), None, top_k=5)  # uncorrelated rows
    assert sum(costs[:1]) < sum(uncertain.turns) <= MOST


def test_no_row_is_read_twice() -> None:
    def read(row_indices: Tensor) -> Tensor:
        return torch.zeros(1, len(row_indices), dtype=torch.float64)

    process = CandidateScores(GaussianProcess(torch.ones(1)), torch.zeros(7), torch.zeros(7, 1), torch.ones(7))
    result = refine(torch.zeros(7), process, 2, 40, read)
    assert result.row_indices.tolist() == list(range(7))
    for rows in (None, 40):
        assert len(refine(torch.zeros(0), None, 2, rows, read).row_indices) == 0


def test_uncertain_rows_are_read_first() -> None:
    world = World(0)
    world.coarse = torch.cat([torch.full((100,), 0.5), torch.zeros(100), torch.full((100,), -0.5)]).double()
    small, large = torch.full((100,), 1e-3), torch.full((100,), 4.0)
    variance = torch.cat([small, large, small]).double()
    world.exact = (
        world.coarse + variance.sqrt() * torch.randn(300, generator=torch.Generator().manual_seed(1)).double()
    )
    turns: list[Tensor] = []

    def read(row_indices: Tensor) -> Tensor:
        turns.append(row_indices)
        return world.read(row_indices)

    process = CandidateScores(GaussianProcess(torch.ones(1)), world.coarse, torch.zeros(300, 1), variance)
    refine(world.coarse, process, 4, 48, read)
    assert bool(((turns[0] < 100) | (turns[0] >= 200)).all())  # before any observation
    later = torch.cat(turns[1:])
    assert bool(((later >= 100) & (later < 200)).all())


def test_two_thirds_of_the_rows_read_are_proponents() -> None:
    world = World(0)
    result = refine(world.coarse, None, 5, 36, world.read)
    expected = torch.cat([world.coarse.topk(24).indices, (-world.coarse).topk(12).indices])
    assert torch.equal(result.row_indices, expected.sort().values)


def test_side_that_is_uncertain_gets_more_rows() -> None:
    """Proponents that are known leave their turns to opponents; the least of either side is read in any case."""
    scores = torch.cat([torch.arange(60, 50, -1), torch.zeros(80), -torch.ones(60)]).double()
    std = torch.cat([torch.full((90,), 1e-3), torch.full((60,), 2.0)]).double()
    unread = torch.ones(150, dtype=torch.bool)
    unread[:10] = False  # the ten best are known
    assert _shares(scores, std, unread, 10, 30, [0, 0]) == [0, 30]
    assert _shares(scores, std, unread, 10, 30, [4, 0]) == [4, 26]
    assert _shares(-scores, std, unread, 10, 30, [0, 4]) == [26, 4]


def test_proponents_come_first_where_chances_are_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.rand(200, generator=generator, dtype=torch.float64)
    scores, std = torch.cat([half, -half]), torch.full((400,), 0.1, dtype=torch.float64)
    unread = torch.ones(400, dtype=torch.bool)
    assert _shares(scores, std, unread, 10, 20, [0, 0]) == [20, 0]
    proponents, opponents = _shares(scores, std, unread, 10, 120, [0, 0])
    assert proponents + opponents == 120
    assert proponents > opponents > 20
