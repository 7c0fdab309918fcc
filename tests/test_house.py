"""The layout of the source: which room may import which, and how long a room may be."""

import ast
from pathlib import Path

import pytest

import depthprune

SOURCE = Path(depthprune.__file__).parent
LONGEST = 350  # lines

# Each room imports only rooms of earlier rows; rooms in one row do not know each other.
LAYERS = [
    {
        "names",
        "filled",
        "spill",
        "origin",
        "nulls",
        "memory",
        "files",
        "progress",
        "wheels",
        "data.groups",
        "data.roles",
        "data.batches",
        "data.chat",
        "embedded_tasks",
        "shards",
        "covariances",
    },
    {
        "weight_files",
        "block_progress",
        "configuration",
        "recovery.regression",
        "search.budget",
        "sites",
        "replacements.base",
        "embedded_catalogue",
        "recovery.checkpoints",
    },
    {"replacements.constants", "replacements.maps", "embedded"},
    {"replacements.kept"},
    {"replacements.registry"},
    {"families", "data.text", "data.questions", "recovery.cosine"},
    {"anatomy"},
    {"refit"},
    {"healing"},
    {"kept_layers"},
    {"surgery", "head", "data.packing", "data.origins", "data.opening", "devices"},
    {"evaluation.allocations"},
    {"evaluation.benchmark", "flops"},
    {"search.latency"},
    {
        "removal",
        "export.table",
        "export.per_layer",
        "export.coded",
        "export.modeling_depthprune",
        "export.configuration_decilm",
        "export.gguf_tokenizer",
        "export.reopen",
        "export.texts",
        "moments",
        "variants",
        "influence.distance",
        "saved_sums",
        "influence.clusters",
        "influence.coalitions",
        "data.streaming",
        "data.choices",
        "data.answers",
        "influence.table",
        "evaluation.cost",
        "evaluation.domains",
        "evaluation.gates",
        "evaluation.harness_model",
        "evaluation.health",
        "recovery.objectives",
        "recovery.prefix_cache",
        "recovery.checkpoint_io",
        "recovery.divergence",
        "recovery.resume",
        "recovery.stages",
        "recovery.start_weights",
        "recovery.stopping",
        "recovery.carried",
        "recovery.scales",
        "callbacks.last_checkpoint",
        "callbacks.boards",
    },
    {"search.costs"},
    {"search.space"},
    {"recovery.carried_progress"},
    {"search.knapsack", "recovery.segments", "export.folding", "export.llama", "export.modeling_decilm"},
    {
        "loading",
        "trusted",
        "export.draft",
        "export.proof",
        "influence.static",
        "influence.attention",
        "influence.cca_bound",
        "influence.baselines",
        "influence.costs",
        "influence.agreement",
        "influence.dependence",
        "recovery.fitting",
        "recovery.scoring",
        "recovery.shared_prefix",
        "plotting",
    },
    {"prediction.shape", "offload", "export.custom_code", "export.nemotron_nas", "export.gguf_file"},
    {"export.formats", "prediction.rate"},
    {
        "prediction.work",
        "influence.choice_costs",
        "influence.angular",
        "influence.figures",
        "recovery.closed_form",
        "recovery.saving",
    },
    {"search.losses"},
    {"search.problem"},
    {"search.greedy"},
    {"search.beam", "search.evolution"},
    {"search.registry", "influence.ablation", "influence.gradient", "recovery.updates", "recovery.explained"},
    {"influence.iterative", "recovery.figures"},
    {"influence.registry"},
    {"influence.estimate"},
    {"influence.offloaded"},
    {"data.module", "pruning", "recovery.module", "evaluation.curve", "evaluation.paired"},
    {
        "search.standing",
        "recovery.offloaded",
        "recovery.cli",
        "recovery.trained",
        "evaluation.task_pack",
        "evaluation.answers",
        "callbacks.monitor",
        "callbacks.recorder",
    },
    {
        "callbacks.forgetting",
        "evaluation.harness",
        "evaluation.rules",
        "evaluation.points",
        "evaluation.figures",
        "evaluation.opened",
        "evaluation.recognition",
    },
    {"evaluation.results", "callbacks.overfitting", "callbacks.agreement", "callbacks.updates", "callbacks.run_card"},
    {"recovery.training"},
    {"recovery.ladder"},
    {"recovery.ablations", "search.finals", "prediction.parts"},
    {"search.frontier", "prediction.compared"},
    {"prediction.commands"},
    {"prediction.dry_run"},
    {"recovery.ablation_file"},
    {"report.results", "report.markdown"},
    {"report.html", "export.card"},
    {"export.folder"},
    {"report.points", "report.gathered", "report.influence", "report.comparison"},
    {"report.task_curve"},
    {
        "report.findings",
        "report.evaluation",
        "report.curve",
        "report.benchmark",
        "report.search",
        "report.tradeoff",
        "report.recommendation",
        "figures",
        "report.ablation",
        "study_file",
    },
    {"report.sections", "report.sweeps", "report.frontier"},
    {"report.render", "report.plans"},
    {
        "commands.ablate",
        "commands.benchmark",
        "commands.catalogue",
        "commands.compare",
        "commands.curve",
        "commands.evaluate",
        "commands.export",
        "commands.fetch",
        "commands.generate",
        "commands.influence",
        "commands.prune",
        "commands.search",
        "commands.frontier",
        "commands.tradeoff",
    },
    {"commands.recommend", "commands.report"},
    {"study"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
DRAWS_ITSELF = ("influence.table", "influence.figures")  # InfluenceTable.plot, imported when it is called
GOES_OUT = ("modeling_decilm.py",)  # into a folder, beside what it imports

FILES = sorted(SOURCE.rglob("*.py"))
ROOMS = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in FILES if path.name != "__init__.py"}


def imported(path: Path) -> set[str]:
    """The rooms of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if path.name in GOES_OUT:
                node.module = f"export.{node.module}" if node.level else node.module
            else:
                assert node.level == 0, f"{path.name} imports relatively"
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name.removeprefix("depthprune.") for name in names} & set(ROOMS)
    return found


def test_every_room_has_its_layer():
    assert set(LEVEL) == set(ROOMS)
    assert sum(map(len, LAYERS)) == len(LEVEL)  # none stands in two


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_import_only_rooms_below_them(room):
    wrong = {other for other in imported(ROOMS[room]) if LEVEL[other] >= LEVEL[room]}
    assert {other for other in wrong if (room, other) != DRAWS_ITSELF} == set()


def test_imports_are_seen():
    assert {"commands.influence", "recovery.ladder", "study_file"} <= imported(ROOMS["study"])
    # everything else only when its command is chosen
    assert imported(ROOMS["cli"]) == {
        "memory",
        "names",
        "nulls",
        "prediction.dry_run",
    }
    assert "influence.figures" in imported(ROOMS["influence.table"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_no_file_is_a_drawer_for_everything():
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "misc", "common")]


def test_every_room_says_what_it_is():
    silent = [room for room, path in ROOMS.items() if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert silent == []
