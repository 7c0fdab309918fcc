"""A pruned model as one of an architecture that transformers has: its config and its weights, before they are saved."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from depthprune.anatomy import Anatomy, pruning_record
from depthprune.export.folding import Fold, filled_blocks, folds, hollow_sites
from depthprune.export.llama import llama_config
from depthprune.export.per_layer import skipping
from depthprune.families import renumber
from depthprune.sites import PruningPlan, Site
from depthprune.surgery import base_state


@dataclass(frozen=True)
class Draft:
    """A model of the architecture's own class, in which every constant that stood in a removed site is folded.

    Attributes:
        model: the model; it shares its tensors with the pruned one where they are the same.
        folded: the weight that each constant went into, by the site where it stood.
        untied_bytes: what a head with weights of its own adds to the model; 0 if it needs none.
        added: what each bias with constants has more than before, ``(D,)``, fp32, once it is rounded to its dtype; by
            the first site whose constant went there, and zero at the others.
        is_exact: whether that is so; embeddings in half precision round a constant differently for every token.
        empty: the attentions and MLPs whose weights are zero, by their numbers in the new model.
    """

    model: PreTrainedModel
    folded: dict[Site, str]
    untied_bytes: int
    added: dict[Site, Tensor]
    is_exact: bool
    empty: frozenset[Site]


def draft(model: PreTrainedModel, halves: str = "refused", as_llama: bool = False, untie: bool = False) -> Draft:
    """Make a model of an architecture that transformers has from a pruned one, which stays as it is.

    Args:
        model: the model, pruned for good.
        halves: what becomes of an attention or MLP that was removed and the rest of its block not: ``"refused"``;
            ``"zero"``, it stays with weights of zero, and a bias of it can hold a constant; ``"left out"``, the same,
            but no constant goes there, so that a format with a word for its absence can leave it out.
        as_llama: whether to make a llama of it.
        untie: whether the head may get weights of its own, for the embeddings to take a constant.

    Raises:
        ValueError: what stands in a removed site cannot be folded, or the model is no llama.
    """
    anatomy = Anatomy.of(model)
    places = filled_blocks(anatomy)
    kept = [anatomy.kept_blocks[place] for place in places]
    gone = [site for site in hollow_sites(anatomy) if site.kind != "block" and site.index in kept]
    if gone and halves == "refused":
        raise ValueError(
            f"{gone[0]} was removed and the rest of its block was not, which a plain {model.config.model_type} has "
            "no form for: choose the format compatible, or keep what depthprune.save wrote."
        )
    constants = folds(anatomy, halves == "zero")
    config = _config(anatomy, places)
    if as_llama:
        config = llama_config(config, anatomy.family)
    first = [fold for fold in constants if not fold.into]
    untied_bytes = _untie(config, anatomy, first[0], untie) if first else 0
    target = _empty(config, model)
    if not all(_keys(target, kept, fold) for fold in constants if fold.into):
        target = _empty(_with_biases(config, anatomy, constants), model)
    state = _state(anatomy, places, target)
    folded: dict[Site, str] = {}
    for fold in constants:
        keys = _keys(target, kept, fold) if fold.into else [_first_key(anatomy)]
        if not keys:
            raise ValueError(_no_bias(anatomy, fold, as_llama))
        folded[fold.site] = keys[0]
    added, is_exact = _add(state, constants, folded)
    target.load_state_dict(state, strict=False, assign=True)
    target.tie_weights()
    target.generation_config = copy.deepcopy(model.generation_config)
    places_of = {index: place for place, index in enumerate(kept)}
    empty = frozenset(Site(places_of[site.index], site.kind) for site in gone)
    made = Anatomy(target, anatomy.family, tuple(range(len(kept))), frozenset())
    silent = [site for site in empty if not any(map(_is_heard, made.chain(site)))]
    if silent:
        target.config.per_layer_config = skipping(silent)
    return Draft(target.eval(), folded, untied_bytes, added, is_exact, empty)


def _is_heard(module: nn.Module) -> bool:
    """Whether a module of an empty half adds anything: a constant that went into its bias."""
    return any(bool(parameter.any()) for parameter in module.parameters())


def _add(
    state: dict[str, Tensor], constants: Sequence[Fold], folded: Mapping[Site, str]
) -> tuple[dict[Site, Tensor], bool]:
    """Add constants to weights, rounded once however many go into one (see :class:`Draft` for what is returned).

    Raises:
        ValueError: the sum is too large for the dtype.
    """
    added: dict[Site, Tensor] = {}
    is_exact = True
    for key in dict.fromkeys(folded.values()):
        here = [fold for fold in constants if folded[fold.site] == key]
        before, constant = state[key].double(), torch.stack([fold.constant for fold in here]).double().sum(0)
        state[key] = (before + constant.to(before.device)).to(state[key].dtype)
        if before.isfinite().all() and not state[key].isfinite().all():
            kind = str(state[key].dtype).removeprefix("torch.")
            raise ValueError(
                f"The constant of {here[0].site} is too large for {key} in {kind}: choose the dtype bfloat16 or "
                "float32."
            )
        if before.dim() == 1:
            added |= {fold.site: torch.zeros_like(fold.constant) for fold in here}
            added[here[0].site] = (state[key].double() - before).float().cpu()
        else:
            added |= {fold.site: fold.constant for fold in here}
            is_exact &= state[key].dtype == torch.float32
    return added, is_exact


def _config(anatomy: Anatomy, places: Sequence[int]) -> PreTrainedConfig:
    """The config of the blocks that are left.

    Where only whole blocks went its record goes on, and says that nothing stands in their places, for a second pruning
    to keep the numbering.
    """
    config = copy.deepcopy(anatomy.model.config)
    renumber(config, anatomy.family, places)
    record = pruning_record(anatomy.model)
    if record is not None:
        plan = PruningPlan.from_dict(record["plan"])
        bare = plan if plan.is_plain else plan.with_replacement("none")
        if bare.is_plain:
            kept = [anatomy.kept_blocks[place] for place in places]
            config.depthprune = {**record, "plan": bare.to_dict(), "kept_blocks": kept}
        else:
            del config.depthprune
    return config


def _untie(config: PreTrainedConfig, anatomy: Anatomy, fold: Fold, untie: bool) -> int:
    """Give the head weights of its own, if the embeddings are to take a constant; how many bytes that adds."""
    if anatomy.family.position_embedding or not config.tie_word_embeddings:
        return 0
    embeddings: Any = anatomy.model.get_input_embeddings()
    size: int = embeddings.weight.nbytes
    if not untie:
        raise ValueError(
            f"Nothing writes to the stream before {fold.site} but the embeddings, which are the head as well: with "
            f"untie the head gets weights of its own ({size / 1e6:.1f} MB more); or keep what depthprune.save wrote."
        )
    config.tie_word_embeddings = False
    return size


def _with_biases(config: PreTrainedConfig, anatomy: Anatomy, constants: Sequence[Fold]) -> PreTrainedConfig:
    """A config in which the layers that are to take constants have biases, as far as the architecture knows them."""
    config = copy.deepcopy(config)
    names = {"attention": anatomy.family.attention_bias, "mlp": anatomy.family.mlp_bias}
    for fold in constants:
        known = [names[site.kind] for site in fold.into if hasattr(config, names[site.kind])]
        if known:
            setattr(config, known[0], True)
    return config


def _empty(config: PreTrainedConfig, like: PreTrainedModel) -> PreTrainedModel:
    """A model of a config, whose weights take no memory."""
    attention = like.config._attn_implementation
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=like.dtype, attn_implementation=attention)


def _keys(target: PreTrainedModel, kept: Sequence[int], fold: Fold) -> list[str]:
    """The biases of a new model that can take a constant, by their keys, the nearest first."""
    whole = Anatomy(target, Anatomy.of(target).family, tuple(kept), frozenset())
    found = []
    for site in fold.into:
        try:
            layer = whole.output_layer(site)
        except ValueError:  # a norm stands behind it, or it is a mixture of experts
            continue
        if getattr(layer, "bias", None) is not None:
            found.append(f"{_name(target, layer)}.bias")
    return found


def _first_key(anatomy: Anatomy) -> str:
    """What is added to the stream first, by its key."""
    model = anatomy.model
    name = anatomy.family.position_embedding
    first = model.get_decoder().get_submodule(name) if name else model.get_input_embeddings()
    return f"{_name(model, first)}.weight"


def _state(anatomy: Anatomy, places: Sequence[int], target: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of the blocks that are left, by the keys of the new model; what it has beyond them is zero."""
    prefix = f"{_name(anatomy.model, anatomy.blocks)}."
    numbers = {str(old): str(new) for new, old in enumerate(places)}
    found: dict[str, Tensor] = {}
    for key, tensor in base_state(anatomy.model).items():
        if key.startswith(prefix):
            old, _, rest = key.removeprefix(prefix).partition(".")
            if old not in numbers:
                continue
            key = f"{prefix}{numbers[old]}.{rest}"
        found[key] = tensor.detach()
    for key, wanted in target.state_dict().items():
        if key not in found:
            found[key] = torch.zeros(wanted.shape, dtype=wanted.dtype)
    return found


def _name(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _no_bias(anatomy: Anatomy, fold: Fold, as_llama: bool) -> str:
    kind = "llama" if as_llama else anatomy.model.config.model_type
    remedy = "keep what depthprune.save wrote"
    if anatomy.family.as_llama is not None and not as_llama:
        remedy = f"write the llama that it is (as_llama), or {remedy}"
    return (
        f"A constant stands in {fold.site}, and no layer of a {kind} that writes to the stream before it can have a "
        f"bias: {remedy}."
    )
