"""Scores and best rows by blocks against a full sort."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_fwdattr.query.ranking import Block, rank, scores, source_coordinates
from tests.helpers.reference import agree


def world(rows: int, k: int, seed: int, block: int) -> tuple[Tensor, Tensor, list[Block]]:
    """Return derivatives of two queries and three tokens, coordinates with ties and zeros, and these in blocks."""
    generator = torch.Generator().manual_seed(seed)
    derivatives = torch.randint(-3, 4, (2, 3, k), generator=generator).float()
    coordinates = torch.randint(-2, 3, (rows, k), generator=generator).float()
    ids, sources = torch.arange(rows) * 7, torch.arange(rows) % 4 - 1
    parts = [slice(at, at + block) for at in range(0, rows, block)]
    return derivatives, coordinates, [(ids[part], sources[part], coordinates[part]) for part in parts]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 99), st.integers(1, 9), st.integers(0, 40))
def test_best_rows_equal_a_full_sort(rows: int, k: int, seed: int, block: int, count: int) -> None:
    derivatives, coordinates, blocks = world(rows, k, seed, block)
    full = torch.einsum("qtk,nk->qnt", derivatives, coordinates)
    assert torch.equal(scores(derivatives, blocks), full.sum(2))
    for query, (best, worst) in enumerate(rank(derivatives, blocks, count)):
        line = full[query].sum(1)
        assert best.scores.tolist() == sorted(line[line > 0].tolist(), reverse=True)[:count]
        assert worst.scores.tolist() == sorted(line[line < 0].tolist())[:count]
        for side in (best, worst):
            assert torch.equal(side.scores, line[side.row_indices])
            assert torch.equal(side.ids, side.row_indices * 7)
            assert torch.equal(side.sources, side.row_indices % 4 - 1)
            assert torch.equal(side.token_scores, full[query][side.row_indices])
            assert len(set(side.row_indices.tolist())) == len(side.row_indices)


def test_scores_change_sign_with_the_derivatives() -> None:
    derivatives, _, blocks = world(20, 3, 0, 6)
    ((best, worst), _), ((flipped_best, flipped_worst), _) = (
        rank(derivatives, blocks, 5),
        rank(-derivatives, blocks, 5),
    )
    assert flipped_best.scores.tolist() == (-worst.scores).tolist()
    assert flipped_worst.scores.tolist() == (-best.scores).tolist()


def test_source_coordinates_are_sums_over_rows() -> None:
    _, coordinates, blocks = world(13, 3, 1, 5)
    summed = source_coordinates(blocks, 4)
    expected = torch.stack([coordinates[torch.arange(13) % 4 - 1 == s].sum(0) for s in range(4)])
    agree(summed, expected, 1e-12)
    assert bool((summed[3] == 0).all())  # no row belongs to it


def test_tokens_are_summed_in_float64() -> None:
    derivatives = torch.tensor([[[1e8], [1.0], [-1e8]]])
    (line,) = scores(derivatives, [(torch.arange(1), torch.zeros(1), torch.ones(1, 1))])
    assert line.tolist() == [1.0]
