"""Sites, removals and plans: parsing, overlaps, halves, runs, fingerprints, files."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from depthprune.sites import Fingerprint, PruningPlan, Removal, Site

HERE = Fingerprint({"model_type": "llama", "num_hidden_layers": 6}, "abc")


def blocks(*indices: int) -> tuple[Site, ...]:
    return tuple(Site(index, "block") for index in indices)


@pytest.mark.parametrize("name", ["block.0", "attention.12", "mlp.7"])
def test_site_names_are_read_and_written(name: str) -> None:
    kind, index = name.split(".")
    site = Site.parse(name)
    assert (site.kind, site.index, str(site)) == (kind, int(index), name)


@pytest.mark.parametrize("text", ["", "block", "block.", "block.-1", "block.1.2", "12", "block 3", "block.x", "mlp.1a"])
def test_what_is_not_a_site(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a site: write block\.12, attention\.12 or mlp\.12"):
        Site.parse(text)


def test_wrong_kinds_name_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'atention'\. Did you mean 'attention'\? Known: attention, block, mlp"):
        Site.parse("atention.3")
    with pytest.raises(ValueError, match=r"cannot be negative: -1"):
        Site(-1, "block")


def test_plans_are_in_depth_order() -> None:
    plan = PruningPlan.of("mlp.10", "block.9", "attention.2", "mlp.1")
    assert [str(site) for site in plan.sites] == ["mlp.1", "attention.2", "block.9", "mlp.10"]
    assert [removal.sites[0] for removal in plan.removals] == list(plan.sites)


@pytest.mark.parametrize(
    "sites", [["block.3", "attention.3"], ["mlp.3", "block.3"], ["block.3", "mlp.3", "attention.3"]]
)
@pytest.mark.parametrize("replacement", ["none", "emulated_update"])
def test_a_block_does_not_overlap_its_parts(sites: list[str], replacement: str) -> None:
    with pytest.raises(ValueError, match=r"overlaps block\.3|block\.3 stands twice"):
        PruningPlan.of(*sites, replacement=replacement)


def test_a_part_does_not_overlap_a_run() -> None:
    with pytest.raises(ValueError, match=r"mlp\.2 overlaps block\.2"):
        PruningPlan((Removal(blocks(1, 2)), Removal((Site(2, "mlp"),))))


@pytest.mark.parametrize("name", ["block.3", "attention.3", "mlp.3"])
def test_a_site_stands_once(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} stands twice"):
        PruningPlan.of(name, name)


def test_bare_halves_become_their_block() -> None:
    plan = PruningPlan.of("mlp.3", "attention.1", "attention.3", "mlp.2")
    assert [str(site) for site in plan.sites] == ["attention.1", "mlp.2", "block.3"]
    assert plan == PruningPlan.of("attention.1", "mlp.2", "block.3")
    assert not plan.is_plain
    assert PruningPlan.of("mlp.3", "attention.3").is_plain


def test_halves_with_a_replacement_stay_apart() -> None:
    both = PruningPlan.of("attention.3", "mlp.3", replacement="emulated_update")
    assert [str(site) for site in both.sites] == ["attention.3", "mlp.3"]
    one = PruningPlan((Removal((Site(3, "attention"),)), Removal((Site(3, "mlp"),), "emulated_update")))
    assert [str(site) for site in one.sites] == ["attention.3", "mlp.3"]
    assert [str(site) for site in both.with_replacement("none").sites] == ["block.3"]


@pytest.mark.parametrize(
    "sites",
    [
        blocks(1, 3),
        blocks(2, 1),
        blocks(1, 1),
        (Site(1, "attention"), Site(2, "attention")),
        (*blocks(1), Site(2, "mlp")),
    ],
)
def test_runs_are_adjacent_blocks(sites: tuple[Site, ...]) -> None:
    with pytest.raises(ValueError, match="only adjacent blocks in depth order"):
        Removal(sites)


def test_removals_without_sense() -> None:
    with pytest.raises(ValueError, match="without sites"):
        Removal(())
    with pytest.raises(ValueError, match="takes no options"):
        Removal(blocks(1), "none", {"rank": 3})


def test_plain_plans() -> None:
    assert PruningPlan((Removal(blocks(1, 2)),)).is_plain
    assert not PruningPlan.of("block.1", replacement="emulated_update").is_plain
    assert not PruningPlan.of("block.1", "mlp.2").is_plain


def test_with_replacement_and_options() -> None:
    plan = PruningPlan.of("block.3", "mlp.7", replacement="low_rank_adapter", rank=8)
    assert [(removal.replacement, removal.options) for removal in plan.removals] == [
        ("low_rank_adapter", {"rank": 8})
    ] * 2
    other = plan.with_replacement("emulated_update", scale=0.5)
    assert other.sites == plan.sites
    assert {removal.replacement for removal in other.removals} == {"emulated_update"}
    assert other.removals[0].options == {"scale": 0.5}


def test_a_second_plan_follows() -> None:
    first = replace(PruningPlan.of("attention.3"), provenance={"metric": "cosine"}, fingerprint=HERE)
    both = first.followed_by(replace(PruningPlan.of("mlp.3", "block.1"), provenance={"metric": "l2"}))
    assert [str(site) for site in both.sites] == ["block.1", "block.3"]
    assert both.provenance == {"metric": "cosine", "then": {"metric": "l2"}}
    assert both.fingerprint == HERE
    with pytest.raises(ValueError, match=r"block\.1 stands twice"):
        both.followed_by(PruningPlan.of("block.1"))


def test_three_prunings_keep_the_provenance_of_all() -> None:
    plans = [replace(PruningPlan.of(f"block.{index}"), provenance={"metric": name}) for index, name in enumerate("abc")]
    provenance = json.dumps(plans[0].followed_by(plans[1]).followed_by(plans[2]).provenance)
    assert all(f'"{name}"' in provenance for name in "abc")


def test_fingerprints() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HERE.check(HERE)
    with pytest.warns(UserWarning, match="other weights"):
        HERE.check(replace(HERE, weights="def"))
    other = replace(HERE, architecture={"model_type": "qwen2", "num_hidden_layers": 6})
    with pytest.raises(ValueError, match="another model: model_type is 'llama' in the plan and 'qwen2' in the model"):
        HERE.check(other)


def test_plans_come_back_from_a_file(tmp_path: Path) -> None:
    removals = (Removal(blocks(1, 2), "low_rank_adapter", {"rank": 2, "alpha": 0.5}), Removal((Site(4, "mlp"),)))
    for plan in (PruningPlan(removals, HERE, {"metric": "cosine", "seed": 0}), PruningPlan(removals), PruningPlan(())):
        path = tmp_path / "new" / "plan.json"
        plan.save(path)
        assert PruningPlan.load(path) == plan
        assert PruningPlan.from_dict(plan.to_dict()) == plan
        assert json.loads(path.read_text())["depthprune_plan"] == 1


GOOD: dict[str, Any] = PruningPlan.of("block.1").to_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "is not a pruning plan"),
        ('{"removals": []}', "is not a pruning plan"),
        (json.dumps({**GOOD, "depthprune_plan": 2}), "version 2, and this depthprune reads version 1"),
        (json.dumps({key: value for key, value in GOOD.items() if key != "removals"}), "damaged"),
        (json.dumps({key: value for key, value in GOOD.items() if key != "fingerprint"}), "damaged"),
        (json.dumps({**GOOD, "removals": [{"sites": ["block.1"]}]}), "damaged"),
        (json.dumps({**GOOD, "removals": [{"sites": [1], "replacement": "none", "options": {}}]}), "damaged"),
        (
            json.dumps({**GOOD, "removals": [{"sites": ["head.1"], "replacement": "none", "options": {}}]}),
            "kind of site",
        ),
        (json.dumps({**GOOD, "removals": 3}), "damaged"),
        (json.dumps({**GOOD, "removals": [{"sites": ["block.1"], "replacement": "none", "options": "x"}]}), "damaged"),
        (json.dumps({**GOOD, "provenance": "x"}), "damaged"),
        (json.dumps({**GOOD, "fingerprint": {"weights": "x"}}), "damaged"),
        (json.dumps({**GOOD, "fingerprint": "x"}), "damaged"),
    ],
)
def test_damaged_plans_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        PruningPlan.load(path)
    assert "plan.json" in str(error.value)


def test_no_plan_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Cannot read a pruning plan from"):
        PruningPlan.load(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="Cannot read a pruning plan from"):
        PruningPlan.load(tmp_path)


def test_runs_share_one_replacement() -> None:
    plan = PruningPlan.of("block.1", "block.2", "attention.3", "block.4", "block.5", "block.7", replacement="linear")
    plan = PruningPlan((*plan.removals, Removal(blocks(6))))
    shared = plan.with_shared_runs()
    assert [removal.sites for removal in shared.removals] == [
        blocks(1, 2),
        (Site(3, "attention"),),
        blocks(4, 5),
        blocks(6),
        blocks(7),
    ]
    assert shared.sites == plan.sites
    assert shared.with_shared_runs() == shared


def test_replacements_at_some_sites_alone():
    plan = PruningPlan.of("block.1", "block.2", "mlp.4", replacement="linear")
    some = plan.only_at([Site.parse("block.2")])
    assert [(removal.sites, removal.replacement) for removal in some.removals] == [
        ((Site(1, "block"),), "none"),
        ((Site(2, "block"),), "linear"),
        ((Site(4, "mlp"),), "none"),
    ]
    assert plan.only_at(plan.sites) == plan
    with pytest.raises(ValueError, match=r"block\.3 is not removed: name some of block\.1, block\.2, mlp\.4"):
        plan.only_at([Site.parse("block.3")])
    with pytest.raises(ValueError, match="have one replacement in the plan: name all of them or none"):
        plan.with_shared_runs().only_at([Site.parse("block.2")])
