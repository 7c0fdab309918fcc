"""Groups of documents that must stay on one side of a split, and the overlap between two texts.

Two documents belong together when they have the same title, or when the shorter one shares over 30% of its distinct
13-grams of words with the other. Groups are the connected components of that relation.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

SHARE = 0.3  # documents that share more than this belong together
WORDS = 13  # words per n-gram

_PRODUCTS_PER_STEP = 20_000_000  # bounds the memory of one step of the sparse product


def group_documents(
    texts: Sequence[str], titles: Sequence[str | None] | None = None, share: float = SHARE, n: int = WORDS
) -> list[str]:
    """A group for every document.

    Words are compared in lower case, without punctuation. Documents of fewer than ``n`` words belong together when
    their words are the same.

    Args:
        texts: the documents.
        titles: one title (or None) per document; documents with the same title belong together.
        share: documents belong together when they share over ``share`` of the shorter one's distinct n-grams.
        n: words per n-gram.

    Returns:
        One 16-digit hexadecimal id per document. It is a hash of the group's smallest text, so it depends neither on
        the order of the documents nor on those outside the group.
    """
    if titles is not None and len(titles) != len(texts):
        raise ValueError(f"{len(texts)} documents came with {len(titles)} titles: give one title (or None) for each.")
    if not texts:
        return []
    words = [_words(text) for text in texts]
    edges = [_same([" ".join(document) for document in words])]
    if titles is not None:
        edges.append(_same([title and title.strip().lower() for title in titles]))
    grams = _gram_matrix(words, n)
    edges.append(_edges_to_shortest(grams, share))
    edges.append(_edges_across(grams, share, _components(edges, len(texts))))
    component = _components(edges, len(texts))
    smallest: dict[int, str] = {}
    for label, text in zip(component.tolist(), texts, strict=True):
        smallest[label] = min(text, smallest.get(label, text))
    names = {
        label: hashlib.sha1(text.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()[:16]
        for label, text in smallest.items()
    }
    return [names[label] for label in component.tolist()]


def overlap_share(texts_a: Sequence[str], texts_b: Sequence[str], n: int = WORDS) -> float:
    """The share of the documents of ``texts_b`` that are, in part, in ``texts_a``.

    A document counts when over 30% of its distinct n-grams occur somewhere in ``texts_a`` (in one document or in
    several), or, if it has fewer than ``n`` words, when a document of ``texts_a`` has the same words.

    Returns:
        A number from 0 to 1; 0 if ``texts_b`` is empty.
    """
    if not texts_b:
        return 0.0
    words_a, words_b = [_words(text) for text in texts_a], [_words(text) for text in texts_b]
    grams = _gram_matrix([*words_a, *words_b], n)
    a, b = grams[: len(texts_a)], grams[len(texts_a) :]
    known = np.zeros(grams.shape[1], dtype=np.int64)
    known[a.indices] = 1
    size = np.diff(b.indptr)
    documents_a = {" ".join(document) for document in words_a}
    same = np.array([" ".join(document) in documents_a for document in words_b])
    return float(np.mean(np.where(size > 0, b @ known > _allowed(size, SHARE), same)))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _allowed(size: np.ndarray, share: float) -> np.ndarray:
    """How many n-grams two documents may share before they belong together, given the shorter one's number of them."""
    # The small term keeps 0.3 * 10 at 3, which binary fractions put just below or above it.
    return np.floor(share * size + 1e-9).astype(np.int64)


def _gram_matrix(words: Sequence[list[str]], n: int) -> csr_array:
    """Which distinct n-grams each document holds: ones in a sparse matrix (documents, n-grams).

    N-grams are compared by 64-bit hashes: among a million of them, two different ones meet once in 30 million runs.
    """
    vocabulary: dict[str, int] = {}
    ids = np.array([vocabulary.setdefault(word, len(vocabulary)) for document in words for word in document], np.int64)
    lengths = np.array([len(document) for document in words], np.int64)
    random = np.random.default_rng(0)
    codes = random.integers(0, 2**64, size=max(len(vocabulary), 1), dtype=np.uint64)
    factors = random.integers(0, 2**64, size=n, dtype=np.uint64) | np.uint64(1)
    windows = max(len(ids) - n + 1, 0)
    hashes = np.zeros(windows, np.uint64)
    for offset, factor in enumerate(factors):
        hashes += codes[ids[offset : offset + windows]] * factor
    document = np.repeat(np.arange(len(words)), lengths)[:windows]
    inside = np.arange(windows) + n <= np.cumsum(lengths)[document]  # windows that end within their document
    distinct, gram = np.unique(hashes[inside], return_inverse=True)
    shape = (len(words), max(len(distinct), 1))
    matrix = coo_array((np.ones(len(gram), np.int32), (document[inside], gram)), shape=shape).tocsr()
    matrix.sum_duplicates()
    matrix.data[:] = 1  # an n-gram that a document repeats counts once
    return matrix


def _same(keys: Sequence[str | None]) -> np.ndarray:
    """Edges (2, E) from each document to the first one with the same key, unless its key is None or empty."""
    first: dict[str, int] = {}
    edges = [(index, first.setdefault(key, index)) for index, key in enumerate(keys) if key]
    empty = [index for index, key in enumerate(keys) if key == ""]
    edges += [(index, empty[0]) for index in empty]
    return np.array(edges, np.int64).reshape(-1, 2).T


def _components(edges: Sequence[np.ndarray], documents: int) -> np.ndarray:
    """The connected component (documents,) of every document."""
    rows, columns = np.concatenate(edges, axis=1)
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(documents, documents))
    return connected_components(graph, directed=False)[1]


def _edges_to_shortest(grams: csr_array, share: float) -> np.ndarray:
    """Edges (2, E) to the shortest document that holds the same n-grams, where enough are shared.

    They cost no more than one look at every n-gram, and join documents made from one template, whose pairs would be
    too many to look at one by one. What they miss is left to :func:`_edges_across`.
    """
    documents, n_grams = grams.shape
    size = np.diff(grams.indptr)
    by_size = np.argsort(size, kind="stable")
    rank = np.empty(documents, np.int64)
    rank[by_size] = np.arange(documents)
    document = np.repeat(np.arange(documents), size)
    lowest = np.full(n_grams, documents)
    np.minimum.at(lowest, grams.indices, rank[document])
    pairs, shared = np.unique(document * documents + by_size[lowest[grams.indices]], return_counts=True)
    a, b = pairs // documents, pairs % documents
    enough = (shared > _allowed(size[b], share)) & (a != b)
    return np.stack([a[enough], b[enough]])


def _edges_across(grams: csr_array, share: float, component: np.ndarray) -> np.ndarray:
    """Edges (2, E) between documents of different components, where enough n-grams are shared.

    Exact, but looks at few pairs: only n-grams that more than one component holds can join two of them, and only a
    document with enough of those can be the shorter one of a pair.
    """
    n_grams = grams.shape[1]
    size = np.diff(grams.indptr)
    label = np.repeat(component, size)
    lowest, highest = np.full(n_grams, len(component)), np.full(n_grams, -1)
    np.minimum.at(lowest, grams.indices, label)
    np.maximum.at(highest, grams.indices, label)
    common = grams[:, np.flatnonzero(lowest < highest)]
    allowed = _allowed(size, share)
    shorter = np.flatnonzero(np.diff(common.indptr) > allowed)
    products = common[shorter] @ np.bincount(common.indices, minlength=common.shape[1])
    steps = np.cumsum(products) // _PRODUCTS_PER_STEP
    transposed = common.T.tocsr()
    edges = [np.empty((2, 0), np.int64)]
    for rows in np.split(shorter, np.flatnonzero(np.diff(steps)) + 1):
        shared = (common[rows] @ transposed).tocoo()
        a, b = rows[shared.row], shared.col
        enough = shared.data > allowed[a]  # where b is the shorter one, the pair comes again from b's side
        edges.append(np.stack([a[enough], b[enough]]))
    return np.concatenate(edges, axis=1)
