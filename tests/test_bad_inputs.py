"""Bad inputs at the front door: each gets exit code 2 and one sentence that names the thing and what to do."""

from __future__ import annotations

import errno
import gzip
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from depthprune.loading import load, save
from depthprune.pruning import prune
from depthprune.sites import PruningPlan
from tests.command_line import LENGTH, Workshop, files_under, fit_settings, refusal, write_config
from tests.test_study import settings as study_settings
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bad(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of damaged things."""
    folder = tmp_path_factory.mktemp("bad")
    plan = PruningPlan.of("block.2").to_dict()
    table = {"depthprune_influence": 1, "provenance": {}, "fingerprint": plan["fingerprint"], "values": {}}
    content: dict[str, Any] = {
        "text.json": "not json",
        "version.json": {**plan, "depthprune_plan": "1"},
        "null.json": {**plan, "removals": [{**plan["removals"][0], "replacement": None}]},
        "list.json": {**plan, "removals": [{**plan["removals"][0], "replacement": ["none"]}]},
        "fingerprint.json": {**plan, "fingerprint": {"architecture": 3, "weights": 4}},
        "other.json": {**plan, "fingerprint": {"architecture": {"model_type": "opt"}, "weights": "x"}},
        "no_values.json": {**table, "fingerprint": {"architecture": {}, "weights": ""}},
        "nan.json": {
            **table,
            "fingerprint": {"architecture": {}, "weights": ""},
            "values": {"cosine": {"block.1": "nan", "block.2": 1.0}},
        },
        "empty.yaml": "",
        "list.yaml": "[1, 2]",
        "null.yaml": "sequences: null",
        "syntax.yaml": "model: [",
        "unknown.yaml": "modle: x",
        "empty.jsonl": "",
        "blank.jsonl": '{"text": " "}\n',
        "short.jsonl": '{"text": "a b c"}\n',
        "column.jsonl": '{"body": "a"}\n',
        "number.jsonl": '{"text": 3}\n',
        "broken.jsonl": '{"text": "a"}\n{"text": \n',
        "text.ckpt": "not a checkpoint",
        "text.pdf": "a",
    }
    for name, value in content.items():
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    (folder / "latin.jsonl").write_bytes('{"text": "é"}\n'.encode("latin-1"))
    (folder / "binary.parquet").write_bytes(bytes(range(256)) * 9)
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    packed = gzip.compress(workshop.text.read_bytes())
    (folder / "truncated.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    torch.save({"state_dict": {}}, folder / "foreign.ckpt")
    model, tokenizer = load(workshop.model)
    (folder / "config.json").write_text("{}")
    for name, config in {
        "bloom": {"model_type": "bloom"},
        "gptq": {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}},
        "weightless": model.config.to_dict(),
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    save(tiny_model(vocab_size=320), None, folder / "tokenless")
    lossy = prune(tiny_model(vocab_size=320), PruningPlan.of("attention.1"))
    type(lossy).save_pretrained(lossy, folder / "lossy")
    tokenizer.save_pretrained(folder / "lossy")
    save(prune(tiny_model(vocab_size=320), PruningPlan.of("attention.1")), tokenizer, folder / "cut")
    cut = folder / "cut" / "depthprune.safetensors"
    cut.write_bytes(cut.read_bytes()[:2000])
    (folder / "held").mkdir()
    (folder / "held" / "mine").write_text("mine")
    return folder


# what is asked for (BAD is the folder of damaged things, OUT a new one), and words of the sentence
INFLUENCE: list[tuple[list[Any], list[str]]] = [
    (["--model", "smollm"], ["'smollm'", "Did you mean 'smollm2-135m-instruct-q4'"]),
    (["--model", ""], ["The model has no name", "give an embedded name"]),
    (["--model", "BAD/held"], ["held", "no config.json"]),
    (["--model", "BAD/bloom"], ["'bloom'", "add a row"]),
    (["--model", "BAD/gptq"], ["quantised (gptq)", "name its full weights"]),
    (["--model", "BAD/weightless"], ["Cannot load the model", "weightless"]),
    (["--model", "BAD/tokenless"], ["Cannot load the tokenizer", "tokenless", "save one beside the model"]),
    (["--model", "BAD/lossy"], ["lossy was written by save_pretrained", "write the model again with depthprune.save"]),
    (["--model", "BAD/cut"], ["depthprune.safetensors is damaged", "save the model anew"]),
    (["--revision", "main"], ["revision is 'main'", "leave revision out"]),
    (["--dtype", "bf16"], ["dtype 'bf16'", "Did you mean 'bfloat16'"]),
    (["--attn_implementation", "flash_attention_2"], ["Cannot load the model"]),
    (["--attn_implementation", "magic"], ["magic"]),
    (["--device_map", "meta"], ["device_map is meta", "choose auto"]),
    (["--device_map", "cuda"], ["Cannot", "model"]),
    (["--accelerator", "gpu"], ["accelerator='gpu'", "--accelerator cpu"]),
    (["--accelerator", "quantum"], ["quantum", "--accelerator cpu"]),
    (["--devices", 0], ["devices is 0", "ask for 1 or more"]),
    (["--devices", -1], ["devices is -1", "ask for 1 or more"]),
    (["--strategy", "magic"], ["strategy='magic'", "choose others"]),
    (["--metrics", "[cosin]"], ["metric 'cosin'", "Did you mean 'cosine'"]),
    (["--metrics", "[]"], ["at least one metric"]),
    (["--metrics", "cosine"], ["metrics", "a list is written [a, b]"]),
    (["--kinds", "[blok]"], ["kind of site 'blok'", "Did you mean 'block'"]),
    (["--denominator", "both"], ["denominator 'both'", "input, output"]),
    (["--sequences", 0], ["score_sequences is 0", "set it to 1 or more"]),
    (["--sequence_length", 1], ["sequence_length is 1", "set it to 2 or more"]),
    (["--sequence_length", 10**6], ["less than one sequence of 1000000", "take a longer text"]),
    (["--batch_size", 0], ["batch_size is 0", "set it to 1 or more"]),
    (["--shares", "{score: 0.5}"], ["shares", "sum to 1"]),
    (["--shares.score", "0.0"], ["shares", "sum to 1"]),
    (["--text", "xsum"], ["--text.path xsum"]),
    (["--text.path", ""], ["text", "name"]),
    (["--text.path", "xsun"], ["'xsun'", "Did you mean 'xsum'"]),
    (["--text.path", "BAD/text.pdf"], ["text.pdf", "rename it"]),
    (["--text.path", "BAD/absent.jsonl"], ["absent.jsonl"]),
    (["--text.path", "BAD/empty.jsonl"], ["empty.jsonl", "is empty"]),
    (["--text.path", "BAD/blank.jsonl"], ["blank.jsonl", "0 tokens", "longer text"]),
    (["--text.path", "BAD/short.jsonl"], ["short.jsonl", "longer text"]),
    (["--text.path", "BAD/column.jsonl"], ["column", "'text'", "body"]),
    (["--text.path", "BAD/number.jsonl"], ["number.jsonl, row 0", "repair the row"]),
    (["--text.path", "BAD/broken.jsonl"], ["broken.jsonl", "repair the file"]),
    (["--text.path", "BAD/latin.jsonl"], ["latin.jsonl"]),
    (["--text.path", "BAD/binary.parquet"], ["binary.parquet"]),
    (["--text.path", "BAD/truncated.jsonl.gz"], ["truncated.jsonl.gz", "repair the file"]),
    (["--text.column", "body"], ["column", "'body'"]),
    (["--text.split", "tset"], ["news.jsonl is one file", "leave text.split out"]),
    (["--text.path", "xsum", "--text.column", "body"], ["xsum is embedded", "leave text.column out"]),
    (["--text.bad_rows", "ignore"], ["bad_rows 'ignore'", "error, skip"]),
    (["--output", ""], ["output folder has no name"]),
    (["--output", "BAD/text.json"], ["text.json"]),
    (["--output", "BAD/text.json/deeper"], ["Cannot write", "Name another place"]),
    (["--output", "BAD/" + "x" * 300], ["Cannot write", "Name another place"]),
    (["--config", "BAD/absent.yaml"], ["absent.yaml"]),
    (["--config", "BAD/empty.yaml"], ["empty.yaml"]),
    (["--config", "BAD/list.yaml"], ["list.yaml", "see depthprune influence --help"]),
    (["--config", "BAD/syntax.yaml"], ["syntax.yaml"]),
    (["--config", "BAD/unknown.yaml"], ["modle"]),
    (["--config", "BAD/binary.yaml"], ["binary.yaml"]),
    (["--colour", "red"], ["colour"]),
    (["--sequences", "null"], ["sequences", "Expected a <class 'int'>"]),
    (["--config", "BAD/null.yaml"], ["sequences is null", "leave it out"]),
]
PRUNE: list[tuple[list[Any], list[str]]] = [
    ([], ["influence, sites, plan or checkpoint", "none"]),
    (["--sites", "[block.1]", "--plan", "BAD/text.json"], ["influence, sites, plan or checkpoint", "sites, plan"]),
    (["--sites", "block.1"], ["sites", "a list is written [a, b]"]),
    (["--sites", "[block1]"], ["'block1' is not a site", "write block.12"]),
    (["--sites", "[head.1]"], ["kind of site 'head'", "attention, block, mlp"]),
    (["--sites", "[block.6]"], ["no block.6", "0 to 5"]),
    (["--sites", "[block.1, block.1]"], ["block.1 stands twice"]),
    (["--sites", "[block.1, mlp.1]"], ["mlp.1 overlaps block.1"]),
    (["--sites", "[]"], ["removes nothing", "name at least one site"]),
    (["--sites", "[block.0,block.1,block.2,block.3,block.4,block.5]"], ["all 6 blocks", "keep at least one"]),
    (["--sites", "[block.1]", "--remove", 2], ["remove does not go with sites", "leave one of the two out"]),
    (["--sites", "[block.1]", "--replacement", "emulated"], ["'emulated'", "Did you mean 'emulated_update'"]),
    (["--sites", "[block.1]", "--replacement", "none", "--options", "{rank: 2}"], ["'none' takes no options"]),
    (["--sites", "[block.1]", "--replacement", "low_rank_adapter", "--options", "{rank: 99}"], ["rank is 99", "1 to"]),
    (["--sites", "[block.1]", "--replacement", "low_rank_adapter", "--options", "{rank: x}"], ["rank", "'x'"]),
    (["--sites", "[block.1]", "--replacement", "low_rank_adapter", "--options", "{rnk: 2}"], ["Did you mean 'rank'"]),
    (
        ["--sites", "[block.1]", "--replacement", "emulated_update", "--options", "{scale: .nan}"],
        ["scale", "give a finite number"],
    ),
    (["--sites", "[block.1]", "--output", "BAD/held"], ["held is not empty", "remove it, or name another one"]),
    (["--sites", "[block.1]", "--plan_only", True, "--output", "BAD/held"], ["held is not empty"]),
    (["--sites", "[block.1]", "--output", "BAD/text.json"], ["text.json is a file", "name a folder"]),
    (["--plan", "BAD/absent.json"], ["absent.json", "Check the path"]),
    (["--plan", "BAD/text.json"], ["text.json is not a pruning plan", "Make it anew"]),
    (["--plan", "BAD/no_values.json"], ["no_values.json is not a pruning plan", "make one with"]),
    (["--plan", "BAD/version.json"], ["version '1'", "make the plan anew"]),
    (["--plan", "BAD/null.json"], ["null.json", "None is not a name"]),
    (["--plan", "BAD/list.json"], ["list.json", "is not a name"]),
    (["--plan", "BAD/fingerprint.json"], ["fingerprint.json", "make it anew"]),
    (["--plan", "BAD/other.json"], ["another model", "Make a plan for this model"]),
    (["--plan", "BAD/other.json", "--replacement", "none"], ["replacement does not go with plan"]),
    (["--influence", "BAD/absent.json", "--remove", 1], ["absent.json"]),
    (["--influence", "BAD/version.json", "--remove", 1], ["version.json is not an influence table", "make one with"]),
    (["--influence", "BAD/no_values.json", "--remove", 1], ["no_values.json", "holds no metric"]),
    (["--influence", "BAD/nan.json", "--remove", 1], ["cosine influence of block.1 is nan"]),
    (["--influence", "BAD/nan.json"], ["how many sites", "--remove N"]),
    (["--influence", "BAD/nan.json", "--remove", 0], ["Cannot remove 0 sites", "ask for 1 or more"]),
    (["--influence", "BAD/nan.json", "--remove", 1, "--kinds", "[]"], ["kinds is empty"]),
    (["--influence", "BAD/nan.json", "--remove", 1, "--metric", "l3"], ["metric", "'l3'", "cosine"]),
    (["--influence", "BAD/nan.json", "--remove", 1, "--kinds", "[mlp]"], ["holds no mlp sites", "score them first"]),
    (["--checkpoint", "BAD/absent.ckpt"], ["no checkpoint", "absent.ckpt"]),
    (["--checkpoint", "BAD/text.ckpt"], ["Cannot read the checkpoint", "text.ckpt"]),
    (["--checkpoint", "BAD/foreign.ckpt"], ["foreign.ckpt was not written by `depthprune fit`"]),
    (["--checkpoint", "BAD/foreign.ckpt", "--options", "{rank: 2}"], ["options does not go with checkpoint"]),
]
FIT: list[tuple[list[Any], list[str]]] = [
    (["--model.plan", "BAD/null.json"], ["null.json"]),
    (["--model.base", "BAD/lossy"], ["written by save_pretrained"]),
    (["--model.replacement", "lora"], ["replacement 'lora'", "low_rank_adapter"]),
    (["--model.replacement", "none", "--model.options", "null"], ["nothing to train", "low_rank_adapter"]),
    (["--model.objective", "kl"], ["objective 'kl'", "language_modelling"]),
    (["--model.optimizer.init_args.lr", -1], ["Invalid learning rate"]),
    (["--data.domains", "{train: {path: xsum}}"], ["'train'", "choose another name"]),
    (["--data.text.path", "BAD/broken.jsonl"], ["broken.jsonl"]),
    (["--ckpt_path", "BAD/absent.ckpt"], ["no checkpoint", "absent.ckpt"]),
    (["--ckpt_path", "BAD/held"], ["no checkpoint", "held"]),
    (["--ckpt_path", "BAD/foreign.ckpt"], ["was not written by `depthprune fit`"]),
    (["--trainer.accelerator", "gpu"], ["Lightning cannot do with these settings", "see depthprune fit --help"]),
    (["--trainer.devices", 0], ["Lightning cannot do with these settings"]),
    (["--trainer.max_steps", -5], ["Lightning cannot do with these settings", "max_steps"]),
    (["--trainer.val_check_interval", 0], ["Lightning cannot do with these settings"]),
    (["--trainer.precision", "8-bit"], ["precision"]),
    (
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"],
        ["val_loss", "1_overfitting/val_loss"],
    ),
    (["--trainer.callbacks+=Magic"], ["Magic"]),
    (["--trainer.max_stepz", 1], ["max_stepz"]),
]
STUDY: list[tuple[dict[str, Any], list[str]]] = [
    ({"plans": []}, ["plans is empty", "name at least one"]),
    ({"plans": [{"kind": "blok", "remove": 1}]}, ["kind of site 'blok'"]),
    ({"plans": [{"kind": "block", "remove": 6}]}, ["blocks-6", "choose 1 to 5"]),
    ({"plans": [{"kind": "block", "remove": 1}] * 2}, ["blocks-1 more than once"]),
    ({"metric": "cos"}, ["metric 'cos'", "Did you mean 'cosine'"]),
    ({"seed": 2**70}, ["seed is", "choose one"]),
    ({"shares": 3}, ["of another kind than it should be", "correct it"]),
    ({"accelerator": "gpu"}, ["accelerator='gpu'", "--accelerator cpu"]),
    ({"rung": {"replacement": "emulated_update", "training": {}}}, ["emulated_update has nothing to train"]),
    ({"rung": {"training": {"steps": 7}}}, ["training.steps is 7", "with 4 validations", "choose a multiple"]),
    ({"rung": {"training": None}}, ["rung has no training"]),
    ({"model": ""}, ["The model has no name"]),
    ({"seed": None}, ["seed is null", "leave it out"]),
    ({"shares": {"score": None}}, ["a part of one, is null", "correct it"]),
    ({"rung": {"training": {"steps": None}}}, ["training.steps is null", "give it a value"]),
    ({"output": ""}, ["output folder has no name"]),
]


def filled(arguments: list[Any], bad: Path) -> list[Any]:
    """The arguments with the folder of damaged things put in."""
    return [str(part).replace("BAD", str(bad)) for part in arguments]


def told(command: list[Any], words: list[str], folder: Path) -> None:
    """Refused with the words in one sentence, and nothing written."""
    before = {path: path.read_bytes() for path in files_under(folder)}
    sentence = refusal(*command)
    assert not [word for word in words if word not in sentence], sentence
    after = {path: path.read_bytes() for path in files_under(folder) if path.name != ".lock"}
    assert after == before


def named(rows: list[Any]) -> Any:
    return pytest.mark.parametrize("row", rows, ids=lambda row: " ".join(map(str, row[0]))[:60] or "nothing")


@named(INFLUENCE)
def test_influence(workshop: Workshop, bad: Path, tmp_path: Path, row: tuple[list[Any], list[str]]) -> None:
    command = ["influence", "--model", workshop.model, "--text.path", workshop.text, "--accelerator", "cpu"]
    command += ["--sequence_length", LENGTH, "--sequences", 2, "--output", tmp_path / "out"]
    (tmp_path / "out").mkdir()
    told([*command, *filled(row[0], bad)], row[1], tmp_path)


@named(PRUNE)
def test_prune(workshop: Workshop, bad: Path, tmp_path: Path, row: tuple[list[Any], list[str]]) -> None:
    command = ["prune", "--model", workshop.model, "--text.path", workshop.text]
    command += ["--sequence_length", LENGTH, "--sequences", 2, "--output", tmp_path / "out"]
    told([*command, *filled(row[0], bad)], row[1], tmp_path)


@named(FIT)
def test_fit(workshop: Workshop, bad: Path, tmp_path: Path, row: tuple[list[Any], list[str]]) -> None:
    settings = fit_settings(workshop, tmp_path / "fit")
    settings["trainer"] |= {"logger": False, "default_root_dir": tmp_path}
    config = write_config(tmp_path / "fit.yaml", settings)
    sentence = refusal("fit", "--config", config, *filled(row[0], bad))
    assert not [word for word in row[1] if word not in sentence], sentence


@named(STUDY)
def test_study(workshop: Workshop, tmp_path: Path, row: tuple[dict[str, Any], list[str]]) -> None:
    settings = {**study_settings(workshop, tmp_path / "study"), **row[0]}
    if "rung" in row[0]:
        settings["plans"] = [{"kind": "block", "remove": 1, "train": True}]
    told(["study", "--config", write_config(tmp_path / "study.yaml", settings)], row[1], tmp_path)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["fetch", "--names", "[xsun]"], ["'xsun'", "Did you mean 'xsum'"]),
        (["fetch", "--names", "xsum"], ["names", "a list is written [a, b]"]),
        (["list", "--all", "true"], ["all"]),
        (["prun"], ["command 'prun'", "Did you mean 'prune'"]),
        (["validate"], ["model"]),
        (["test", "--config", "BAD/absent.yaml"], ["absent.yaml"]),
    ],
)
def test_other_commands(bad: Path, tmp_path: Path, command: list[Any], words: list[str]) -> None:
    told(filled(command, bad), words, tmp_path)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda model, text: prune(model, ["block.1"]), ["is not a pruning plan", "PruningPlan.of"]),  # type: ignore[arg-type]
        (lambda model, text: prune(model, "absent.json"), ["absent.json"]),
        (lambda model, text: model.save_pretrained("x"), ["use depthprune.save"]),
        (lambda model, text: load("a/b/c"), ["'a/b/c'"]),
        (lambda model, text: save(model, None, ""), ["output folder has no name"]),
    ],
)
def test_from_python(attempt: Callable[..., Any], words: list[str]) -> None:
    model = prune(tiny_model(), PruningPlan.of("attention.1"))
    with pytest.raises(ValueError, match=r"[.]$") as caught:
        attempt(model, [])
    assert not [word for word in words if word not in str(caught.value)], caught.value


def test_a_disk_that_fills_up(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    command = ["prune", "--model", workshop.model, "--sites", "[block.1]", "--plan_only", True]
    sentence = refusal(*command, "--output", tmp_path / "out")
    assert "No space left on device. Free some space" in sentence
    assert not [path for path in files_under(tmp_path) if path.suffix == ".json"]


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
from depthprune.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_real_limit_on_file_size(workshop: Workshop, tmp_path: Path) -> None:
    command = ["prune", "--model", workshop.model, "--sites", "[attention.1]", "--output", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, command)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Free some space" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_there_are_enough_of_them() -> None:
    assert len(INFLUENCE) + len(PRUNE) + len(FIT) + len(STUDY) >= 60
