"""``depthprune recommend``: which metric to prune by, from collected results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from depthprune.commands import curve, tradeoff
from depthprune.evaluation.domains import Interval
from depthprune.evaluation.rules import Rule, rules_of, silent_about, task_rules_of
from depthprune.files import make_folder, only_writer, read_json, write_json
from depthprune.origin import origin
from depthprune.report.html import write_page
from depthprune.report.recommendation import console_table, recommendation_report, share_text
from depthprune.sites import PLURALS

VERSION = 1
KNOWN = {"depthprune_curve": curve.VERSION, "depthprune_tradeoff": tradeoff.VERSION}


def recommend(results: Sequence[str], output: str) -> None:
    """Turn measured curves and trade-offs of one model into a rule: which metric for which sites and how many.

    Args:
        results: curve.json of `depthprune curve` and tradeoff.json of `depthprune tradeoff`, also without the flag:
            depthprune recommend a/curve.json b/tradeoff.json --output folder.
        output: folder for recommendation.json, .md and .html.
    """
    found = _read(results)
    curves, tradeoffs = ([content for _, content in found if name in content] for name in KNOWN)
    try:
        models = {content["weights"]: _model(content) for _, content in found}
        rules, task_rules = rules_of(curves), list(task_rules_of(tradeoffs))
    except (KeyError, TypeError, AttributeError, IndexError, AssertionError, StopIteration, RuntimeError) as error:
        raise ValueError(f"One of {', '.join(results)} is damaged ({error!r}): make it anew.") from error
    if len(models) > 1:
        named = ", ".join(sorted(set(models.values())))
        raise ValueError(f"The results are of models with different weights ({named}): name those of one.")
    if not rules and not task_rules:
        raise ValueError("A rule needs a curve of two metrics or a finished trade-off: measure one more metric.")
    silent = silent_about(rules)
    (model,) = models.values()
    folder = make_folder(output)
    with only_writer(folder):
        content = {
            "depthprune_recommendation": VERSION,
            "model": model,
            **origin(),
            "results": [str(path) for path, _ in found],
            "rules": [_rule(rule) for rule in rules],
            "tasks": [{**vars(rule), "recommended": rule.recommended, **_intervals(vars(rule))} for rule in task_rules],
            "silent": [{"kind": kind, "over": low, "up_to": high} for kind, low, high in silent],
        }
        write_json(folder / "recommendation.json", content)
        write_page(folder / "recommendation.md", recommendation_report(model, rules, task_rules, silent), content)
    if rules:
        Console().print(console_table(rules))
    for task_rule in task_rules:
        print(
            f"{PLURALS[task_rule.kind]}, {task_rule.share:.0%}, tasks by {task_rule.measure}: make the plan on "
            f"{task_rule.recommended}."
        )
    if silent:
        print("No data on " + "; ".join(f"{PLURALS[kind]} {share_text(low, high)}" for kind, low, high in silent) + ".")
    print(f"Wrote recommendation.json, .md and .html to {folder}.")


def _read(paths: Sequence[str]) -> list[tuple[Path, dict[str, Any]]]:
    """The results files.

    Raises:
        ValueError: there is none, one is named twice, cannot be read or is of another kind or version.
    """
    if not paths:
        raise ValueError("There are no results: name curve.json or tradeoff.json files.")
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise ValueError(f"One of {', '.join(paths)} is named twice: name different files.")
    found: list[tuple[Path, dict[str, Any]]] = []
    for path in map(Path, paths):
        content = read_json(path, "results")
        is_known = isinstance(content, dict) and any(content.get(name) == version for name, version in KNOWN.items())
        if not is_known or not content.get("is_finished"):
            raise ValueError(
                f"{path} holds neither a curve nor a finished trade-off of this version: make one with `depthprune "
                "curve` or `depthprune tradeoff`."
            )
        for other, before in found:
            if before == content:
                raise ValueError(f"{other} and {path} hold the same results: name each once.")
        found.append((path, content))
    return found


def _model(content: Mapping[str, Any]) -> str:
    return str(content["model"] if "model" in content else content["config"]["model"])


def _rule(rule: Rule) -> dict[str, Any]:
    return {**vars(rule), "regrets": {name: regret.to_dict() for name, regret in rule.regrets.items()}}


def _intervals(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.to_dict() for name, value in fields.items() if isinstance(value, Interval)}
