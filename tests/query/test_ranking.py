import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_fwdattr.query.ranking import Block, rank, scores, source_coordinates
from tests.helpers.reference import agree


def world(rows: int, k: int, seed: int, block: int) -> tuple[Tensor, Tensor, list[Block]]:
    """A readout of two queries and three tokens, coordinates with ties and zeros, and the same in blocks."""
    generator = torch.Generator().manual_seed(seed)
    readout = torch.randint(-3, 4, (2, 3, k), generator=generator).float()
    coordinates = torch.randint(-2, 3, (rows, k), generator=generator).float()
    ids, sources = torch.arange(rows) * 7, torch.arange(rows) % 4 - 1
    parts = [slice(at, at + block) for at in range(0, rows, block)]
    return readout, coordinates, [(ids[part], sources[part], coordinates[part]) for part in parts]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 99), st.integers(1, 9), st.integers(0, 40))
def test_the_best_rows_are_those_of_a_full_sort(rows: int, k: int, seed: int, block: int, count: int) -> None:
    readout, coordinates, blocks = world(rows, k, seed, block)
    full = torch.einsum("qtk,nk->qnt", readout, coordinates)
    agree_exactly = scores(readout, blocks)
    assert torch.equal(agree_exactly, full.sum(2))
    for query, (best, worst) in enumerate(rank(readout, blocks, count)):
        line = full[query].sum(1)
        assert best.scores.tolist() == sorted(line[line > 0].tolist(), reverse=True)[:count]
        assert worst.scores.tolist() == sorted(line[line < 0].tolist())[:count]
        for side in (best, worst):
            assert torch.equal(side.scores, line[side.positions])
            assert torch.equal(side.ids, side.positions * 7)
            assert torch.equal(side.sources, side.positions % 4 - 1)
            assert torch.equal(side.token_scores, full[query][side.positions])
            assert len(set(side.positions.tolist())) == len(side.positions)


def test_scores_flip_with_the_query() -> None:
    readout, _, blocks = world(20, 3, 0, 6)
    ((best, worst), _), ((mirrored, also), _) = rank(readout, blocks, 5), rank(-readout, blocks, 5)
    assert mirrored.scores.tolist() == (-worst.scores).tolist()
    assert also.scores.tolist() == (-best.scores).tolist()


def test_a_source_has_the_sum_of_its_rows_coordinates() -> None:
    _, coordinates, blocks = world(13, 3, 1, 5)
    found = source_coordinates(blocks, 4)
    expected = torch.stack([coordinates[torch.arange(13) % 4 - 1 == s].sum(0) for s in range(4)])
    agree(found, expected, 1e-12)
    assert bool((found[3] == 0).all())  # no row belongs to it


def test_sums_over_many_tokens_are_taken_in_float64() -> None:
    readout = torch.tensor([[[1e8], [1.0], [-1e8]]])
    (line,) = scores(readout, [(torch.arange(1), torch.zeros(1), torch.ones(1, 1))])
    assert line.tolist() == [1.0]
