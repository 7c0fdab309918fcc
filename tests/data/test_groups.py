"""Groups of documents, against a computation over all pairs with plain sets."""

import itertools
import re
import time

import numpy as np
import pytest

from depthprune.data import groups
from depthprune.data.groups import group_documents, overlap_share


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def belong(a: str, b: str, share: float, n: int) -> bool:
    first, second = grams(a, n), grams(b, n)
    if first and second:
        return len(first & second) > share * min(len(first), len(second))
    return re.findall(r"\w+", a.lower()) == re.findall(r"\w+", b.lower())


def partition(labels: list) -> set[frozenset[int]]:
    return {frozenset(i for i, other in enumerate(labels) if other == label) for label in labels}


def slow_groups(texts: list[str], titles: list[str | None], share: float, n: int) -> set[frozenset[int]]:
    labels = list(range(len(texts)))
    for i, j in itertools.combinations(range(len(texts)), 2):
        same_title = titles[i] is not None and titles[i] == titles[j]
        if same_title or belong(texts[i], texts[j], share, n):
            old, new = labels[j], labels[i]
            labels = [new if label == old else label for label in labels]
    return partition(labels)


def quotes(passage: list[str], prefix: str) -> list[str]:
    """Documents of 12 words that quote 5 words each: 3 of 10 trigrams, so not enough to belong together at 30%.

    Every trigram of the passage is in one of them, so the shortest document with it is never one of the long ones.
    """
    return [
        " ".join([*passage[i : i + 5], *(f"{prefix}{i}q{j}" for j in range(7))]) for i in range(0, len(passage) - 4)
    ]


def random_texts(random: np.random.Generator, count: int) -> list[str]:
    """Documents of 0 to 30 words, pieced together from a few shared passages and words of their own."""
    passages = [[f"p{k}x{i}" for i in range(8)] for k in range(6)]
    texts = []
    for _ in range(count):
        words: list[str] = []
        for _ in range(random.integers(0, 4)):
            own = [f"w{random.integers(0, 50)}" for _ in range(random.integers(1, 9))]
            words += passages[random.integers(0, 6)] if random.random() < 0.4 else own
        texts.append(" ".join(words))
    return texts


@pytest.mark.parametrize("seed", range(40))
def test_groups_are_those_of_all_pairs(seed: int) -> None:
    random = np.random.default_rng(seed)
    texts = random_texts(random, 40)
    titles = [f"t{random.integers(0, 60)}" if random.random() < 0.3 else None for _ in texts]
    share, n = random.choice([0.0, 0.2, 0.3, 0.5, 0.9]), int(random.integers(2, 6))
    expected = slow_groups(texts, titles, share, n)
    assert 1 < len(expected) < len(texts)
    assert partition(group_documents(texts, titles, share=share, n=n)) == expected


@pytest.mark.parametrize("step", [7, 100, 20_000_000])
@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_found_behind_shorter_documents(seed: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_PRODUCTS_PER_STEP", step)
    random = np.random.default_rng(seed)
    passages = [[f"p{k}x{i}" for i in range(18)] for k in range(8)]
    texts = [text for k, passage in enumerate(passages) for text in quotes(passage, f"k{k}")]
    for i in range(16):
        own = [f"o{i}x{j}" for j in range(random.integers(20, 60))]
        texts.append(" ".join([*passages[random.integers(0, 8)], *own, *passages[random.integers(0, 8)]]))
    texts = [texts[i] for i in random.permutation(len(texts))]
    expected = slow_groups(texts, [None] * len(texts), 0.3, 3)
    assert len(expected) < len(texts)
    assert partition(group_documents(texts, n=3)) == expected


@pytest.mark.parametrize(("words", "together"), [(14, False), (15, True)])
def test_share_must_be_exceeded_behind_shorter_documents(words: int, together: bool) -> None:
    """42 and 47 trigrams: 12 shared ones are under 30% of the shorter document, 13 are more."""
    passage = [f"p{i}" for i in range(words)]
    long = [*passage, *(f"a{i}" for i in range(44 - words))], [*passage, *(f"b{i}" for i in range(49 - words))]
    found = group_documents([*map(" ".join, long), *quotes(passage, "k")], n=3)
    assert (found[0] == found[1]) == together
    assert len(set(found)) == len(found) - together


@pytest.mark.parametrize(("shared", "together"), [(3, False), (4, True)])
def test_share_must_be_exceeded(shared: int, together: bool) -> None:
    """10 and 30 13-grams: 3 shared ones are 30% of the shorter document, 4 are more."""
    short = [f"s{i}" for i in range(22)]
    long = [f"l{i}" for i in range(42 - 12 - shared)] + short[: 12 + shared]
    a, b = group_documents([" ".join(short), " ".join(long)])
    assert (a == b) == together


def test_repeated_grams_count_once() -> None:
    """A document that repeats one shared 13-gram has 13 distinct ones, all shared, however long it is."""
    loop = [f"w{i}" for i in range(13)]
    other = loop * 2 + [f"x{i}" for i in range(27)]
    assert len(set(group_documents([" ".join(loop * 20), " ".join(other)]))) == 1
    assert len(set(group_documents([" ".join([*loop[:12], "y"] * 20), " ".join(loop)]))) == 2


def test_case_and_punctuation_do_not_matter() -> None:
    assert len(set(group_documents(["A short one, here.", "a SHORT one here", "", "!", "another short one"]))) == 3


def test_grams_do_not_cross_documents() -> None:
    words = [f"w{i}" for i in range(26)]
    texts = [" ".join(words[:7]), " ".join(words[7:20]), " ".join(words[:13])]
    assert len(set(group_documents(texts))) == 3


def test_ids_do_not_depend_on_order_or_on_other_groups() -> None:
    random = np.random.default_rng(1)
    texts = random_texts(random, 60)
    ids = group_documents(texts, n=3)
    order = random.permutation(len(texts))
    assert group_documents([texts[i] for i in order], n=3) == [ids[i] for i in order]
    kept = [i for i, label in enumerate(ids) if label != ids[0]]
    assert group_documents([texts[i] for i in kept], n=3) == [ids[i] for i in kept]
    assert all(re.fullmatch("[0-9a-f]{16}", label) for label in ids)


def test_id_is_the_hash_of_the_smallest_text() -> None:
    # printf 'alpha' | sha1sum
    assert group_documents(["beta", "alpha"], ["one", "One "]) == ["be76331b95dfc399"] * 2


def test_titles_must_fit() -> None:
    with pytest.raises(ValueError, match="2 documents came with 1 titles"):
        group_documents(["a", "b"], ["a"])
    assert group_documents([]) == []


@pytest.mark.parametrize(("template", "own", "expected"), [(40, 100, 12_000), (60, 10, 1)])
def test_templates_in_every_document_stay_fast(template: int, own: int, expected: int) -> None:
    """All pairs share 28 or 48 n-grams: over a billion products if each pair were looked at."""
    random = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(5000)])
    head = " ".join(words[:template])
    texts = [f"{head} {' '.join(random.choice(words, own))}" for _ in range(12_000)]
    begin = time.perf_counter()
    assert len(set(group_documents(texts))) == expected
    assert time.perf_counter() - begin < 15


@pytest.mark.parametrize("seed", range(10))
def test_overlap_share_is_that_of_sets(seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = random_texts(random, 20), random_texts(random, 30)
    known = set().union(*(grams(text, 3) for text in a))
    hits = [
        len(grams(text, 3) & known) > 0.3 * len(grams(text, 3))
        if grams(text, 3)
        else any(text.split() == other.split() for other in a)
        for text in b
    ]
    assert 0 < sum(hits) < len(b)
    assert overlap_share(a, b, n=3) == pytest.approx(sum(hits) / len(b))


def test_overlap_share_of_nothing() -> None:
    assert overlap_share(["a"], []) == 0
    assert overlap_share([], ["a", "b"]) == 0
