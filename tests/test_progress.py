from collections.abc import Iterator

import pytest

from depthprune.progress import tracked


def endless() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def test_gives_every_item_in_order_and_a_line_on_the_error_stream(capsys):
    assert list(tracked([3, 1, 2], "Counting sheep")) == [3, 1, 2]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Counting sheep" in printed.err
    assert "3/3" in printed.err


def test_takes_the_total_of_items_that_do_not_tell(capsys):
    assert list(tracked(iter("ab"), "Letters", total=2)) == ["a", "b"]
    assert "2/2" in capsys.readouterr().err


def test_takes_items_one_by_one():
    items = tracked(endless(), "Numbers")
    assert [next(items), next(items)] == [0, 1]
    items.close()  # type: ignore[attr-defined]


def test_an_error_of_the_items_comes_through():
    def broken() -> Iterator[int]:
        yield 1
        raise RuntimeError("wolf")

    with pytest.raises(RuntimeError, match="wolf"):
        list(tracked(broken(), "Counting"))
