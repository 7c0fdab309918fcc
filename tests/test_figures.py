from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import imread

from depthprune.figures import (
    damage_figure,
    drawable,
    influence_figure,
    recovery_figure,
    training_figure,
    write_figure,
)
from depthprune.report.results import STUDY_VERSION, StudyResults
from depthprune.sites import Site
from tests.report.synthetic_study import BLOCKS, DOMAINS, influence_table, synthetic_study


@pytest.fixture(scope="module")
def results() -> StudyResults:
    return StudyResults.of(synthetic_study())


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def legend_labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def points(axes: Axes) -> list[float]:
    """The values of a forest plot, from the top."""
    lines = [item.lines[0] for item in axes.containers if isinstance(item, ErrorbarContainer)]
    return [float(np.asarray(line.get_xdata())[0]) for line in lines]


def test_influence_has_a_panel_for_each_metric_and_a_line_for_each_kind():
    table = influence_table()
    figure = influence_figure(table)
    assert titles(figure) == ["cosine", "relative_l1", "relative_l2", "l1", "l2"]
    assert legend_labels(figure) == ["blocks", "attentions", "MLPs"]
    attention = figure.axes[0].lines[1]
    assert attention.get_xdata().tolist() == list(range(BLOCKS))  # type: ignore[union-attr]
    assert attention.get_ydata()[7] == table.values["cosine"][Site(7, "attention")]  # type: ignore[index]
    assert figure.axes[-1].get_xlabel() == "block number (unpruned model)"
    assert all(axes.get_ylabel() for axes in figure.axes)


def test_influence_is_logarithmic_only_where_it_spreads():
    scales = {axes.get_title(loc="left"): axes.get_yscale() for axes in influence_figure(influence_table()).axes}
    assert scales["cosine"] == "linear"
    assert scales["l1"] == scales["l2"] == "log"


def test_influence_says_what_it_divides_by():
    figure = influence_figure(influence_table(), ["relative_l2"])
    assert figure.axes[0].get_ylabel() == "|update|₂ / |after|₂"


def test_influence_of_an_unknown_metric():
    with pytest.raises(ValueError, match="Did you mean 'cosine'"):
        influence_figure(influence_table(), ["cosin"])
    with pytest.raises(ValueError, match="name at least one"):
        influence_figure(influence_table(), [])


def test_damage_bars_are_the_losses_above_unpruned(results: StudyResults):
    axes = damage_figure(results).axes[0]
    none = next(item for item in axes.containers if not isinstance(item, ErrorbarContainer))
    plans = results.plans[:-1]
    expected = [results.above_unpruned(plan, "none", "xsum").value for plan in plans]  # type: ignore[union-attr]
    assert np.allclose([bar.get_height() for bar in none], expected)


def test_damage_puts_far_worse_plans_on_their_own_scale(results: StudyResults):
    figure = damage_figure(results)
    assert titles(figure) == ["xsum", "own scale", "pubmedqa", "own scale"]
    assert [label.get_text() for label in figure.axes[3].get_xticklabels()] == ["10\nMLPs"]
    assert figure.axes[0].get_ylim()[1] < 3 < 8 < figure.axes[1].get_ylim()[1]
    assert legend_labels(figure) == ["none", "emulated update", "trained adapter"]


def test_damage_of_similar_plans_shares_one_scale():
    similar = {f"blocks-{n}": ("block", n, dict.fromkeys(DOMAINS, (n / 10, -0.1, None))) for n in (4, 6, 8)}
    assert titles(damage_figure(synthetic_study(similar, documents=20))) == ["xsum", "pubmedqa"]


def test_recovery_shows_gains_and_what_is_noise(results: StudyResults):
    figure = recovery_figure(results)
    emulated = figure.axes[0]
    order = [label.get_text() for label in emulated.get_yticklabels()]
    gains = dict(zip(order, points(emulated), strict=True))
    assert gains["10 blocks"] == pytest.approx(0.155, abs=0.02)
    assert gains["3 blocks"] < 0
    filled = {
        name: bar.lines[0].get_markerfacecolor() != "white"
        for name, bar in zip(order, emulated.containers, strict=True)
        if isinstance(bar, ErrorbarContainer)
    }
    assert filled["10 blocks"]
    assert not filled["1 block"]
    assert titles(figure)[2:4] == ["emulated update (own scale), xsum", "pubmedqa"]


def test_training_is_relative_to_the_start(results: StudyResults):
    figure = training_figure(results)
    assert titles(figure) == ["6 blocks", "10 blocks", "10 attentions"]
    curve = results.training["blocks-6"]["curve"]
    distant = figure.axes[0].lines[2]
    assert distant.get_ydata()[0] == 0  # type: ignore[index]
    assert distant.get_ydata()[-1] == pytest.approx(curve[-1]["pubmedqa"] - curve[0]["pubmedqa"])  # type: ignore[index]
    assert legend_labels(figure)[0] == "training documents"


def test_figures_wait_for_their_results():
    study = synthetic_study(documents=5)
    assert list(drawable(study)) == ["removed", "damage", "recovery", "training", "influence"]
    for name in [name for name in study["losses"] if not name.endswith("none") and name != "unpruned"]:
        del study["losses"][name]
    del study["training"]
    assert list(drawable(study)) == ["removed", "damage", "influence"]
    with pytest.raises(ValueError, match="no loss of a replacement"):
        recovery_figure(study)
    with pytest.raises(ValueError, match="no training yet"):
        training_figure(study)
    with pytest.raises(ValueError, match="no losses of pruned models"):
        damage_figure({"depthprune_study": STUDY_VERSION})


def test_names_are_not_mathematics(tmp_path: Path):
    study = synthetic_study({"$a_b^$": ("block", 6, dict.fromkeys(DOMAINS, (0.7, -0.1, -0.2)))}, documents=5)
    study["plans"]["$x{$"] = study["plans"]["$a_b^$"]  # the same size, so that both show their names
    for name, draw in drawable(study).items():
        write_figure(draw(), tmp_path / f"{name}.png")
    assert len(list(tmp_path.iterdir())) == 5


def test_figures_are_written_whole_or_not(tmp_path: Path, results: StudyResults):
    path = tmp_path / "figures" / "influence.png"
    write_figure(influence_figure(influence_table(), ["cosine"]), path)
    assert imread(path).shape[1] == 1200  # 8 inches at 150 dots per inch
    before = path.read_bytes()
    broken = Figure()
    broken.savefig = lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="No space left"):
        write_figure(broken, path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["influence.png"]


def test_one_document_has_no_error_bars(tmp_path: Path):
    study = synthetic_study(documents=1)
    figure = damage_figure(study)
    bars = [item for axes in figure.axes for item in axes.containers if isinstance(item, ErrorbarContainer)]
    assert bars
    caps = np.concatenate([np.asarray(cap.get_ydata(), dtype=float) for bar in bars for cap in bar.lines[1]])
    assert np.isnan(caps).all()
    write_figure(figure, tmp_path / "damage.png")
    write_figure(recovery_figure(study), tmp_path / "recovery.png")
