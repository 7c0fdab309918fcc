"""Every configuration in configs/ says how it is run, and its command takes it, without network."""

import shlex
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from jsonargparse import auto_parser

from depthprune.cli import COMMANDS, LIGHTNING
from depthprune.evaluation.gates import read_gates
from depthprune.evaluation.health import PROBES
from depthprune.evaluation.recognition import RECOGNITION_PROBES
from depthprune.evaluation.results import names_of_figures
from depthprune.evaluation.task_pack import PACK, PREFIX
from tests.command_line import run

HOME = Path(__file__).parents[1]
GATES = sorted((HOME / "configs" / "gates").glob("*.yaml"))  # beside a configuration of evaluate
CONFIGS = [path for path in sorted((HOME / "configs").rglob("*.yaml")) if path not in GATES]
BY_ROOM = {
    command: [path for path in CONFIGS if path.parent.name == command]
    for command in (
        *("study", "influence", "curve", "prune", "evaluate", "tradeoff", "ablate", "generate", "export"),
        *("benchmark", "search", "frontier"),
    )
}
FITS = [path for path in CONFIGS if path.parent.name == "fit"]


def name(path: Path) -> str:
    return path.relative_to(HOME).as_posix()


def first_command(path: Path) -> list[str]:
    """The command in the first line, without what has to run before it."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    return shlex.split(first.removeprefix("# ").split("   (after: ")[0])


def test_there_are_configs_of_every_command():
    assert FITS
    assert GATES
    assert all(BY_ROOM.values())
    assert len(FITS) + sum(map(len, BY_ROOM.values())) == len(CONFIGS)


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_opens_with_the_command_that_runs_it(path):
    assert first_command(path) == ["depthprune", path.parent.name, "--config", name(path)]
    assert path.parent.name in {*COMMANDS, *LIGHTNING}


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_names_what_has_to_run_before_it_by_a_config_that_is_there(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    if "(after: " in first:
        before = shlex.split(first.split("(after: ")[1].removesuffix(")"))
        assert before[0] == "depthprune"
        assert HOME / before[-1] in CONFIGS
        assert before[1] == Path(before[-1]).parent.name


@pytest.mark.parametrize("path", [path for paths in BY_ROOM.values() for path in paths], ids=name)
def test_is_taken_by_its_command(path):
    room, function = COMMANDS[path.parent.name][0].split(":")
    parser = auto_parser(getattr(import_module(room), function), as_positional=False, exit_on_error=False)
    config = parser.instantiate_classes(parser.parse_args(["--config", str(path)]))
    assert config.output.startswith("checkpoints/")
    assert config.model


@pytest.mark.parametrize("path", FITS, ids=name)
def test_is_taken_by_lightning(path, capsys):
    assert run("fit", "--config", path, "--print_config") == 0
    printed = capsys.readouterr().out
    assert "replacement: low_rank_adapter" in printed
    assert "depthprune.callbacks.forgetting.ForgettingMonitor" in printed


def test_a_misspelt_option_would_be_refused(tmp_path, capsys):
    config = tmp_path / "fit.yaml"
    config.write_text(FITS[0].read_text(encoding="utf-8").replace("replacement:", "replacment:"))
    assert run("fit", "--config", config, "--print_config") == 2
    assert "replacment" in capsys.readouterr().err


@pytest.mark.parametrize("path", GATES, ids=name)
def test_gates_limit_what_is_measured(path):
    command = first_command(path)
    assert command[:3] == ["depthprune", "evaluate", "--config"]
    assert command[4:] == ["--gates", name(path)]
    config = yaml.safe_load((HOME / command[3]).read_text(encoding="utf-8"))
    domains = [config["text"]["path"], *config["domains"]]
    tasks = {
        task: [f"{metric['metric']},none" for metric in PACK[task.removeprefix(PREFIX)]["metric_list"]]
        for task in config["tasks"]
    }
    assert read_gates(path, names_of_figures(domains, tasks, probes=(*PROBES, *RECOGNITION_PROBES)))
