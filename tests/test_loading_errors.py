"""What loading refuses, each with one sentence that says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from depthprune.loading import load, load_tokenizer, parse_dtype, save
from depthprune.pruning import prune
from depthprune.sites import PruningPlan
from tests.tiny_models import calibration, tiny_model


def test_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for load_it in (load, load_tokenizer):
        with pytest.raises(ValueError, match="Did you mean 'smollm2-135m-instruct-q4'"):
            load_it("smollm2-135m")
        for name in ("nothing", "./nothing", "/nothing/there", "checkpoints/mine", "a/b/c", "~/nothing"):
            with pytest.raises(ValueError, match=r"Unknown model.*Known: smollm2-135m-instruct-q4"):
                load_it(name)


def test_hub_names_without_a_hub() -> None:
    with pytest.raises(ValueError, match="Cannot load the model nobody/nothing-like-this"):
        load("nobody/nothing-like-this")
    with pytest.raises(ValueError, match="Cannot load the tokenizer of nobody/nothing-like-this"):
        load_tokenizer("nobody/nothing-like-this")
    with pytest.raises(ValueError, match="Cannot load the model"):
        load("not a name/of a model")


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no model: it has no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="Cannot load the model"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not know the model type"):
        load(tmp_path)


def test_other_families_and_quantised_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(ValueError, match=r"does not know the model type 'bloom'\. Known: cohere"):
        load(tmp_path)
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is quantised \(gptq\)"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", ["int8", "float64", "bf16", "bfloat"])
def test_wrong_dtypes(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown dtype .*Known: auto, bfloat16, float16, float32"):
        parse_dtype(dtype)
    save(tiny_model(), None, tmp_path / "model")
    with pytest.raises(ValueError, match="Unknown dtype"):
        load(tmp_path / "model", dtype=dtype)


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    save(tiny_model(), None, tmp_path / "plain")
    save(prune(tiny_model(), PruningPlan.of("mlp.1")), None, tmp_path / "pruned")
    for name in ("plain", "pruned"):
        with pytest.raises(ValueError, match="Cannot load the tokenizer of"):
            load(tmp_path / name)


def test_devices_and_attentions_that_do_not_exist(tmp_path: Path, tiny_tokenizer: Any) -> None:
    save(tiny_model(), tiny_tokenizer, tmp_path / "plain")
    save(prune(tiny_model(), PruningPlan.of("mlp.1")), tiny_tokenizer, tmp_path / "pruned")
    for name in ("plain", "pruned"):
        with pytest.raises(ValueError, match="teleport"):
            load(tmp_path / name, device_map="teleport")
        with pytest.raises(ValueError, match="teleport"):
            load(tmp_path / name, attn_implementation="teleport")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("depthprune.safetensors", Path.unlink, r"is damaged: it has no depthprune\.safetensors"),
        ("depthprune.safetensors", cut, "is damaged"),
        ("config.json", edit(lambda content: content.update(depthprune_version=2)), "written in format 2.*reads 1"),
        ("config.json", edit(lambda content: content.pop("base_config")), "damaged"),
        ("config.json", edit(lambda content: content.pop("record")), "damaged"),
        ("config.json", edit(lambda content: content["record"].pop("kept_blocks")), "damaged"),
        ("config.json", edit(lambda content: content["base_config"].pop("dtype")), "damaged"),
        ("config.json", edit(lambda content: content["base_config"].update(hidden_size=64)), "damaged"),
        (
            "config.json",
            edit(lambda content: content["record"]["plan"]["removals"].pop()),
            r"is damaged: its weights lack .*mlp\.down_proj",
        ),
    ],
)
def test_damaged_pruned_folders(
    tmp_path: Path, tiny_tokenizer: Any, file: str, damage: Callable[[Path], None], message: str
) -> None:
    plan = PruningPlan.of("attention.2", "mlp.4", replacement="emulated_update")
    folder = save(prune(tiny_model(), plan, calibration()), tiny_tokenizer, tmp_path / "folder")
    damage(folder / file)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_damaged_plain_folders(tmp_path: Path, tiny_tokenizer: Any) -> None:
    damages: tuple[Callable[[Path], None], ...] = (Path.unlink, cut)
    for number, damage in enumerate(damages):
        folder = save(tiny_model(), tiny_tokenizer, tmp_path / str(number))
        damage(folder / "model.safetensors")
        with pytest.raises(ValueError, match="Cannot load the model"):
            load(folder)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a folder's weights."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_weights_that_do_not_fill_the_model(tmp_path: Path, tiny_tokenizer: Any) -> None:
    for name in ("lacking", "more", "fewer", "biased"):
        save(tiny_model(), tiny_tokenizer, tmp_path / name)
    rewritten(tmp_path / "lacking", lambda state: state.pop("model.layers.2.mlp.down_proj.weight"))
    for name, entry, value in (("more", "num_hidden_layers", 7), ("fewer", "num_hidden_layers", 5)):
        edit(lambda config, entry=entry, value=value: config.update({entry: value, "layer_types": None}))(  # type: ignore[misc]
            tmp_path / name / "config.json"
        )
    edit(lambda config: config.update(mlp_bias=False))(tmp_path / "biased" / "config.json")
    for name, message in {
        "lacking": r"lack model\.layers\.2\.mlp\.down_proj\.weight",
        "more": r"lack model\.layers\.6\..* more: they and config\.json do not belong together",
        "fewer": r"hold, beyond what config\.json describes, model\.layers\.5\.",
        "biased": r"hold, beyond what config\.json describes, model\.layers\.0\.mlp\.down_proj\.bias",
    }.items():
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name)


@pytest.mark.parametrize(
    "record",
    [
        "x",
        {},
        {"plan": None},
        {"kept_blocks": None},
        {"kept_blocks": [0, 0, 0, 0, 0]},
        {"kept_blocks": [0, 1]},
        {"unpruned": {}},
        {"unpruned": {"architecture": {}, "weights": "x"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("sites", ["block.2", "mlp.2"])
def test_damaged_records_of_a_pruning(tmp_path: Path, tiny_tokenizer: Any, record: Any, sites: str) -> None:
    save(prune(tiny_model(), PruningPlan.of(sites)), tiny_tokenizer, tmp_path / "pruned")
    name = "depthprune" if sites == "block.2" else "record"

    def damage(config: dict[str, Any]) -> None:
        config[name] = {**config[name], **record} if record and isinstance(record, dict) else record

    edit(damage)(tmp_path / "pruned" / "config.json")
    with pytest.raises(ValueError, match=r"save the model anew|make one with|make it anew"):
        load(tmp_path / "pruned")


def test_weights_on_disk_are_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    save(tiny_model(), tiny_tokenizer, tmp_path / "whole")
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    places["model.rotary_emb"] = "cpu"
    with pytest.raises(ValueError, match=r"Cannot load the model|stay on disk"):
        load(tmp_path / "whole", device_map=places)
