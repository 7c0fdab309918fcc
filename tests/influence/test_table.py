"""The result table: order, plans, files."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from depthprune.influence.table import InfluenceTable
from depthprune.sites import Fingerprint, Site

FINGERPRINT = Fingerprint({"model_type": "llama", "num_hidden_layers": 4}, "abc")
BLOCKS = [0.5, 0.1, 0.3, 0.1]
ATTENTIONS = [0.2, 0.05, 0.4, 0.0]
MLPS = [0.9, 0.8, 0.02, 0.7]


def table(**columns: dict[str, float]) -> InfluenceTable:
    """A table by hand; without columns, all sites of four blocks under ``cosine``."""
    parts = zip(("block", "attention", "mlp"), (BLOCKS, ATTENTIONS, MLPS), strict=True)
    every = {f"{kind}.{index}": value for kind, values in parts for index, value in enumerate(values)}
    columns = columns or {"cosine": every, "l2": {name: -value for name, value in every.items()}}
    values = {metric: {Site.parse(name): value for name, value in column.items()} for metric, column in columns.items()}
    return InfluenceTable(values, FINGERPRINT, {"text": "xsum", "tokens": 12})


def names(sites: Any) -> list[str]:
    return [str(site) for site in sites]


def test_values_by_name() -> None:
    assert table()["cosine"]["attention.2"] == 0.4
    assert table().of_metric("l2")[Site(2, "attention")] == -0.4
    assert table().metrics == ("cosine", "l2")
    assert names(table().sites)[:4] == ["attention.0", "block.0", "mlp.0", "attention.1"]


def test_order_is_lowest_first_and_of_equals_the_deeper_first() -> None:
    assert names(table().order("cosine", ["block"])) == ["block.3", "block.1", "block.2", "block.0"]
    assert names(table().order("l2", ["mlp"])) == ["mlp.0", "mlp.1", "mlp.3", "mlp.2"]
    mixed = ["attention.3", "mlp.2", "attention.1", "attention.0", "attention.2", "mlp.3", "mlp.1", "mlp.0"]
    assert names(table().order("cosine", ["attention", "mlp"])) == mixed
    equal = table(cosine=dict.fromkeys(["block.1", "block.0", "block.2"], 0.5))
    assert names(equal.order("cosine", ["block"])) == ["block.2", "block.1", "block.0"]


def test_plans_take_the_lowest() -> None:
    plan = table().plan("cosine", ["attention"], remove=2, replacement="low_rank_adapter", rank=4)
    assert names(plan.sites) == ["attention.1", "attention.3"]
    assert [(removal.replacement, removal.options) for removal in plan.removals] == [
        ("low_rank_adapter", {"rank": 4})
    ] * 2
    assert plan.fingerprint == FINGERPRINT
    assert plan.provenance == {"text": "xsum", "tokens": 12, "metric": "cosine", "kinds": ["attention"]}
    assert names(table().plan("cosine", ["block"], remove=3).sites) == ["block.1", "block.2", "block.3"]


def test_plans_over_mixed_kinds_do_not_overlap() -> None:
    # in order: attention.3, mlp.2, attention.1, block.3, block.1, attention.0, block.2, ...
    every = ["block", "attention", "mlp"]
    assert names(table().plan("cosine", every, remove=3).sites) == ["attention.1", "mlp.2", "attention.3"]
    assert names(table().plan("cosine", every, remove=4).sites) == [
        "attention.0",
        "attention.1",
        "mlp.2",
        "attention.3",
    ]
    blocks_first = table(cosine={"block.1": 0.0, "attention.1": 0.1, "mlp.1": 0.2, "mlp.0": 0.3})
    assert names(blocks_first.plan("cosine", every, remove=2).sites) == ["mlp.0", "block.1"]
    with pytest.raises(ValueError, match="Cannot remove 3 of 4"):
        blocks_first.plan("cosine", every, remove=3)


def test_both_halves_of_a_block_become_the_block() -> None:
    halves = table(cosine={"attention.1": 0.1, "mlp.1": 0.2, "mlp.0": 0.3})
    assert names(halves.plan("cosine", ["attention", "mlp"], remove=2).sites) == ["block.1"]
    standing = halves.plan("cosine", ["attention", "mlp"], remove=2, replacement="emulated_update")
    assert names(standing.sites) == ["attention.1", "mlp.1"]


@pytest.mark.parametrize("remove", [0, -1, 5])
def test_impossible_numbers(remove: int) -> None:
    with pytest.raises(
        ValueError, match=f"Cannot remove {remove} (of 4 block sites: choose fewer|sites: ask for 1 or more)"
    ):
        table().plan("cosine", ["block"], remove=remove)


def test_wrong_names() -> None:
    with pytest.raises(ValueError, match=r"'cosin'\. Did you mean 'cosine'"):
        table()["cosin"]
    with pytest.raises(ValueError, match=r"'cosin'\. Did you mean 'cosine'"):
        table().plan("cosin", ["block"], 1)
    with pytest.raises(ValueError, match=r"kind of site 'blocks'\. Did you mean 'block'"):
        table().order("cosine", ["blocks"])
    with pytest.raises(ValueError, match="holds no mlp sites: score them first"):
        table(cosine={"block.1": 0.1}).order("cosine", ["block", "mlp"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    broken = table(cosine={"block.1": 0.1, "block.2": value, "mlp.1": 0.5})
    with pytest.raises(ValueError, match=rf"cosine influence of block\.2 is {value}: check the model"):
        broken.plan("cosine", ["block"], 1)
    assert names(broken.plan("cosine", ["mlp"], 1).sites) == ["mlp.1"]
    with pytest.raises(ValueError, match=r"block\.2"):
        broken.to_json(tmp_path / "table.json")
    assert not list(tmp_path.iterdir())


def test_tables_come_back_from_json(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.json"
    table().to_json(path)
    again = InfluenceTable.load(path)
    assert again == table()
    assert again.plan("cosine", ["block"], 2) == table().plan("cosine", ["block"], 2)


def test_csv_has_a_row_for_each_site(tmp_path: Path) -> None:
    whole = table(cosine={"block.1": 0.1, "attention.0": 1 / 3}, l2={"block.1": 2.5})
    whole.to_csv(tmp_path / "table.csv")
    rows = list(csv.DictReader((tmp_path / "table.csv").open(newline="")))
    assert [(row["site"], row["kind"], row["block"]) for row in rows] == [
        ("attention.0", "attention", "0"),
        ("block.1", "block", "1"),
    ]
    assert float(rows[0]["cosine"]) == 1 / 3
    assert (rows[0]["l2"], float(rows[1]["l2"])) == ("", 2.5)


GOOD = table().to_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "is not an influence table of version 1"),
        (json.dumps({**GOOD, "depthprune_influence": 7}), "is not an influence table of version 1"),
        (json.dumps({**GOOD, "values": 3}), "damaged"),
        (json.dumps({**GOOD, "values": {"cosine": {"block.1": None}}}), "damaged"),
        (json.dumps({**GOOD, "values": {"cosine": {"block.1": "x"}}}), "damaged"),
        (json.dumps({**GOOD, "values": {"cosine": {"block": 1.0}}}), "damaged"),
        (json.dumps({**GOOD, "values": {"cosine": {"block.1": 10**400}}}), "damaged"),
        (json.dumps({**GOOD, "provenance": {"run_length": "two"}}), "damaged .*run_length is 'two'"),
        ('{"values": ' + "9" * 5000 + "}", "not valid JSON"),
        (json.dumps({**GOOD, "fingerprint": None}), "damaged"),
        (json.dumps({key: value for key, value in GOOD.items() if key != "provenance"}), "damaged"),
    ],
)
def test_damaged_tables_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        InfluenceTable.load(path)
    assert "table.json" in str(error.value)


def test_no_table_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Cannot read an influence table"):
        InfluenceTable.load(tmp_path / "nothing.json")
    (tmp_path / "file").write_text("x")
    for write in (table().to_json, table().to_csv):
        with pytest.raises(ValueError, match="Cannot write"):
            write(tmp_path / "file" / "table")


def test_blocks_lend_their_influence_to_what_is_inside() -> None:
    column = {Site(0, "block"): 3.0, Site(1, "block"): 1.0, Site(1, "attention"): 9.0, Site(2, "block"): 2.0}
    table = InfluenceTable({"cosine": column}, Fingerprint({}, ""), {"text": "mine"})
    carried = table.carried_to("attention")
    assert carried["cosine"] == {"attention.0": 3.0, "attention.1": 1.0, "attention.2": 2.0}
    plan = carried.plan("cosine", ["attention"], 2)
    assert [str(site) for site in plan.sites] == ["attention.1", "attention.2"]
    assert plan.provenance["carried_from"] == "block"
    with pytest.raises(ValueError, match="Unknown kind of site inside a block 'block'"):
        table.carried_to("block")
    attentions = InfluenceTable({"cosine": {Site(1, "attention"): 9.0}}, Fingerprint({}, ""), {})
    with pytest.raises(ValueError, match="holds no single blocks"):
        attentions.carried_to("mlp")
