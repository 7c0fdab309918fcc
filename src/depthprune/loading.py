"""Load and save models: an embedded name, a hub name or a folder, pruned or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from depthprune import embedded
from depthprune.anatomy import pruning_record
from depthprune.devices import warn_of_slow_dtype
from depthprune.embedded_catalogue import MODELS
from depthprune.families import CUSTOM_CODE_PREFIX, check_supported, family_of, refuse_quantised
from depthprune.files import check_new_folder, whole_folder, write_json
from depthprune.filled import check_filled, first_line
from depthprune.names import unknown_name
from depthprune.removal import check_record, restore_structure
from depthprune.sites import PruningPlan
from depthprune.surgery import open_slots

MODEL_TYPE = "depthprune"
"""``model_type`` of a folder that only depthprune opens."""

FOLDER_VERSION = 1
WEIGHTS = "depthprune{suffix}.safetensors"
PLAN_FILE = "plan.json"


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, in evaluation mode.

    Args:
        name: an embedded model's name, a hub name (``owner/name``), or a folder, also one that :func:`save` wrote.
        dtype: ``"auto"`` (as saved), ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        revision: branch, tag or commit on the hub.
        device_map: as in transformers: ``"auto"``, a device, or a map from modules to devices.
        attn_implementation: ``"sdpa"``, ``"eager"``, ``"flash_attention_2"``, ...

    Raises:
        ValueError: there is no such model, its family is not known, or it is quantised. Code from the hub is never run.
    """
    source = resolve(name, revision)
    torch_dtype = parse_dtype(dtype)
    if device_map == "meta":
        raise ValueError("device_map is meta, which has no weights: choose auto, cpu or a device of yours.")
    config = config_dict(source, revision)
    if config.get("model_type") == MODEL_TYPE:
        folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(source, revision=revision))
        model = _load_pruned(folder, config, torch_dtype, device_map, attn_implementation)
    else:
        refuse_custom_code(name, config)
        family_of(config.get("model_type", "without model_type"))
        refuse_lossy_folder(name, config)
        refuse_quantised(config.get("quantization_config"))
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                revision=revision,
                dtype=torch_dtype,
                device_map=device_map,
                attn_implementation=attn_implementation,
                trust_remote_code=False,
                output_loading_info=True,
            )
            model, found = loaded
        except Exception as error:  # whatever a damaged config or weight file makes of transformers
            raise ValueError(f"Cannot load the model {name}: {first_line(error)}") from error
        check_supported(model.config)
        _check_weights(name, model, found)
        check_record(model, f"{name}/config.json")
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ValueError(
            f"With device_map={device_map!r} some weights of {name} stay on disk, where they cannot be pruned: choose "
            "one that keeps them in memory, such as cpu."
        )
    if str(name) in MODELS:
        # Run cards and messages name the model, not this machine's cache.
        model.name_or_path = model.config._name_or_path = str(name)
    warn_of_slow_dtype(model)
    return model.eval(), load_tokenizer(name, revision=revision)


def load_tokenizer(name: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load only the tokenizer of a model (see :func:`load`).

    Raises:
        ValueError: there is no such model, or it has no tokenizer.
    """
    source = resolve(name, revision)
    try:
        content, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        config = _base_config(content) if content.get("model_type") == MODEL_TYPE else None
        return AutoTokenizer.from_pretrained(source, config=config, revision=revision, trust_remote_code=False)
    except Exception as error:  # whatever damaged files make of transformers
        raise ValueError(
            f"Cannot load the tokenizer of {name} ({first_line(error).rstrip('.:')}): save one beside the model."
        ) from error


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path | str) -> Path:
    """Save a model, whole or not at all.

    A model from which only whole blocks went, with nothing in their place, becomes a plain folder that
    ``AutoModelForCausalLM`` opens. Any other pruned model becomes a folder with ``model_type: depthprune`` and its own
    weight file, which the Auto classes refuse by name and :func:`load` opens.

    Args:
        model: a model without open slots.
        tokenizer: saved beside it, if given.
        folder: a folder that does not exist yet or is empty.

    Raises:
        ValueError: the model still has open slots, the folder is not empty, or it cannot be written.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is not a model: give what depthprune.load or prune gave.")
    if open_slots(model):
        raise ValueError("The model's sites can still be switched: remove them for good with depthprune.prune first.")
    record = pruning_record(model)
    folder = check_new_folder(folder)
    with whole_folder(folder) as partial:
        if record is None or PruningPlan.from_dict(record["plan"]).is_plain:
            model.save_pretrained(partial)
        else:
            write_pruned_config(model, partial)
            save_torch_state_dict(
                {key: tensor.contiguous() for key, tensor in model.state_dict().items()},
                partial,
                filename_pattern=WEIGHTS,
                shared_tensors_to_discard=list(model.all_tied_weights_keys),
            )
            model.generation_config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if record is not None:
            PruningPlan.from_dict(record["plan"]).save(partial / PLAN_FILE)
    return folder


def write_pruned_config(model: PreTrainedModel, folder: Path) -> None:
    """Write the config.json of a folder that only depthprune opens."""
    base_config = model.config.to_dict()
    base_config.pop("depthprune")
    content = {
        "model_type": MODEL_TYPE,
        "depthprune_version": FOLDER_VERSION,
        "how_to_load": "depthprune.load(folder)",
        "base_config": base_config | {"dtype": str(model.dtype).removeprefix("torch.")},
        "record": pruning_record(model),
    }
    write_json(folder / "config.json", content)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    """A dtype, also by name, or ``"auto"``.

    Raises:
        ValueError: no such dtype, or one that a model cannot have.
    """
    names = ("float32", "bfloat16", "float16")
    if dtype == "auto":
        return "auto"
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in names:
        raise unknown_name("dtype", dtype, ["auto", *names])
    return getattr(torch, dtype)


def refuse_custom_code(name: str | Path, config: dict[str, Any]) -> None:
    """Refuse a folder with a modelling file that an export wrote."""
    if str(config.get("model_type")).startswith((CUSTOM_CODE_PREFIX, "nemotron-nas")):
        raise ValueError(
            f"{name} was exported with a modelling file of its own, for engines without depthprune: name the pruned "
            "model that it was exported from."
        )


def refuse_lossy_folder(name: str | Path, config: dict[str, Any]) -> None:
    """Refuse a folder that claims to be a plain model, although what stands in the removed sites is not in it."""
    record = config.get("depthprune")
    plan = record.get("plan") if isinstance(record, dict) else None
    if record is not None and not PruningPlan.from_dict(plan, f"The record of the pruning in {name}").is_plain:
        raise ValueError(
            f"{name} was written by save_pretrained after a pruning that only depthprune can save, so weights are "
            "missing: write the model again with depthprune.save."
        )


def _check_weights(name: str | Path, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Refuse weights that do not fill the model, or hold more blocks than it has."""
    blocks = f".{family_of(model.config.model_type).blocks}."
    beyond = [key for key in found["unexpected_keys"] if blocks in f".{key}" and key.endswith(("weight", "bias"))]
    check_filled(name, found, beyond)


def resolve(name: str | Path, revision: str | None) -> str:
    """An embedded name's folder, an existing folder, or a hub name, as transformers takes it."""
    text = str(name)
    if not text.strip():
        raise ValueError("The model has no name: give an embedded name, a hub name or a folder.")
    if revision is not None and (text in MODELS or Path(text).expanduser().is_dir()):
        raise ValueError(f"revision is {revision!r}, but {text} is not on the hub and has none: leave revision out.")
    if text in MODELS:
        return str(embedded.model_folder(text))
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"The folder {text} holds no model: it has no config.json.")
        return str(path)
    is_hub_name = text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith("/")
    if not is_hub_name or path.parent.is_dir():
        raise unknown_name("model (neither an embedded name, a hub name, nor a folder)", text, MODELS)
    return text


def config_dict(source: str, revision: str | None) -> dict[str, Any]:
    """The content of a model's config.json.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    except (OSError, HFValidationError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"Cannot load the model {source}: {first_line(error)}") from error
    blocks = config.get("num_hidden_layers") if isinstance(config, dict) else 0
    if isinstance(blocks, int) and blocks < 1:
        raise ValueError(f"{source}/config.json describes no model: fetch the model again.")
    return config


def _load_pruned(
    folder: Path,
    content: dict[str, Any],
    dtype: torch.dtype | str,
    device_map: str | dict[str, Any] | None,
    attn_implementation: str | None,
) -> PreTrainedModel:
    """Rebuild a pruned model's structure without weights, then give it the saved ones."""
    if content.get("depthprune_version") != FOLDER_VERSION:
        raise ValueError(
            f"{folder} was written in format {content.get('depthprune_version')}, and this depthprune reads "
            f"{FOLDER_VERSION}: open it with the version that wrote it."
        )
    try:
        model = pruned_structure(content, dtype, attn_implementation)
        check_record(model, f"{folder}/config.json")
        state = _read_weights(folder)
        if whole := sorted(key for key, tensor in state.items() if not tensor.is_floating_point()):
            raise ValueError(f"{folder} is damaged: {whole[0]} holds no floating-point numbers. Save the model anew.")
        tied = set(model.all_tied_weights_keys)
        cast = {key: tensor if ".replacement." in key else tensor.to(model.dtype) for key, tensor in state.items()}
        missing, unexpected = model.load_state_dict(cast, strict=False, assign=True)
    except (KeyError, TypeError, AttributeError, RuntimeError, ImportError, IndexError) as error:
        raise ValueError(f"{folder} cannot be opened ({first_line(error)}): save the model anew.") from error
    except ValueError as error:
        if str(folder) in str(error):
            raise
        remedy = "choose another" if "attn_implementation" in str(error) else "save the model anew"
        raise ValueError(f"{folder} cannot be opened ({first_line(error).rstrip('.')}): {remedy}.") from error
    if set(missing) - tied or unexpected:
        raise ValueError(
            f"{folder} is damaged: its weights lack {sorted(set(missing) - tied)} and have {sorted(unexpected)} too "
            "many. Save it anew."
        )
    model.requires_grad_(True)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder}/generation_config.json is damaged: remove it, or save the model anew."
            ) from error
    if isinstance(device_map, str) and device_map not in ("auto", "balanced", "balanced_low_0", "sequential"):
        try:
            return model.to(device_map)  # type: ignore[arg-type]
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"Cannot put the model on {device_map}: {first_line(error)}") from error
    if device_map is not None:
        if isinstance(device_map, str):
            device_map = infer_auto_device_map(model, no_split_module_classes=list(model._no_split_modules or []))
        return dispatch_model(model, device_map)
    return model


def _base_config(content: dict[str, Any]) -> PreTrainedConfig:
    """The config of the base architecture in a pruned folder's config."""
    base_config = dict(content["base_config"])
    return AutoConfig.for_model(base_config.pop("model_type"), **base_config)


def pruned_structure(
    content: dict[str, Any], dtype: torch.dtype | str, attn_implementation: str | None
) -> PreTrainedModel:
    """The model that a pruned folder's config describes, its weights still on the meta device."""
    config = _base_config(content)
    model_dtype = parse_dtype(content["base_config"]["dtype"]) if dtype == "auto" else dtype
    assert isinstance(model_dtype, torch.dtype)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=model_dtype, attn_implementation=attn_implementation)
        restore_structure(model, content["record"])
    return model


def _read_weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob(WEIGHTS.format(suffix="*")))
    if not files:
        raise ValueError(f"{folder} is damaged: it has no {WEIGHTS.format(suffix='')}. Save it anew.")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state.update(load_file(file))
        except Exception as error:  # safetensors raises an error type that it does not export
            raise ValueError(f"{file} is damaged ({first_line(error)}): save the model anew.") from error
    return state
