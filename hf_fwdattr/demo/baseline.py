"""Text similarity, the measure to beat: BM25 between the rows and what the model was asked and said."""

from collections.abc import Sequence

import bm25s
import numpy as np


class TextSimilarity:
    """Ranks rows by BM25 (k1 1.5, b 0.75). Ties keep the order of the rows, which is random in the fact world.

    Args:
        rows: Texts that are ranked.
        stopwords: Leave out English stop words. Right when the prompt is part of the text, where "the", "of" and "is"
            would reward rows of the same template; wrong for an answer alone, which may be one ("In", indium).
    """

    def __init__(self, rows: Sequence[str], stopwords: bool):
        self._stopwords = "en" if stopwords else None
        self._index = bm25s.BM25()
        self._index.index(self._words(rows), show_progress=False)
        self._size = len(rows)

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        return bm25s.tokenize(
            list(texts), stopwords=self._stopwords, token_pattern=r"(?u)[\w']+", return_ids=False, show_progress=False
        )

    def scores(self, text: str) -> np.ndarray:
        """(rows,) BM25 of every row for `text`; higher is more alike, and all zero for a text without a word."""
        words = self._words([text])[0]
        return self._index.get_scores(words) if words else np.zeros(self._size, dtype=np.float32)

    def ranking(self, text: str) -> np.ndarray:
        """(rows,) positions of the rows, most alike first."""
        return np.argsort(-self.scores(text), kind="stable")
