"""Budgets, as they are written."""

from __future__ import annotations

import pytest

from depthprune.search.budget import Budget


def test_a_budget_is_read_as_it_is_written() -> None:
    budget = Budget.parse("kv<=0.6 params <= 0.85,latency<=.5")
    assert budget.limits == {"kv": 0.6, "params": 0.85, "latency": 0.5}
    assert Budget.parse(str(budget)) == budget


def test_what_is_over() -> None:
    budget = Budget.parse("kv<=0.6 params<=0.85")
    assert budget.allows({"kv": 0.6, "params": 0.85, "flops": 1.0})
    assert budget.excess({"kv": 0.5, "params": 0.95, "flops": 1.0}) == pytest.approx(
        {"kv": 0.0, "params": 0.1}, abs=1e-5
    )
    assert not budget.allows({"kv": 0.6001, "params": 0.1})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "The budget is empty"),
        ("params", "is no part of a budget"),
        ("params>=0.5", "is no part of a budget"),
        ("params<=85%", "is no part of a budget"),
        ("params<=1e-1", "is no part of a budget"),
        ("parms<=0.5", "Did you mean 'params'"),
        ("params<=1", "give a share over 0 and under 1"),
        ("params<=0", "give a share over 0 and under 1"),
        ("params<=85", "give a share over 0 and under 1"),
        ("params<=0.8 params<=0.7", "names params twice"),
    ],
)
def test_what_is_no_budget(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Budget.parse(text)
