"""The model card of an exported folder, with the hub's metadata, and the folder's way to the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from depthprune.embedded_catalogue import MODELS
from depthprune.evaluation.domains import DomainLoss
from depthprune.evaluation.opened import UNPRUNED
from depthprune.report.markdown import escaped, table
from depthprune.sites import PruningPlan

CARD = "README.md"
DAMAGED = "The evaluation for the card is damaged or of another kind: name evaluation.json of `depthprune evaluate`."
HAVE_CODE = ("custom-code", "nemotron-nas")  # formats whose folders have a modelling file


@dataclass(frozen=True)
class CardData:
    """What a card says beyond what the model itself tells.

    Attributes:
        license: of the model that it came from, as the hub names it; of an embedded model it is known.
        evaluation: results of ``depthprune evaluate`` whose figures the card shows.

    Raises:
        ValueError: such a licence has no name on the hub, or the evaluation is damaged or has no two models.
    """

    license: str | None = None
    evaluation: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+_-]*", self.license):
            raise ValueError(
                f"{self.license!r} is no licence as the hub names them: write one such as apache-2.0 or other."
            )
        assert self.losses is not None  # a damaged evaluation is found before anything is written

    @cached_property
    def losses(self) -> list[list[str]]:
        """By text and model: its loss and how far it is above the unpruned one's; empty without an evaluation."""
        if self.evaluation is None:
            return []
        if not isinstance(self.evaluation, Mapping):
            raise ValueError(DAMAGED)
        try:
            return _losses(self.evaluation["variants"])
        except (KeyError, TypeError, AttributeError, ArithmeticError, AssertionError) as error:
            raise ValueError(DAMAGED) from error


def write_card(folder: Path, about: Mapping[str, Any], name: str | None, data: CardData) -> None:
    """Write ``README.md`` into an exported folder.

    Args:
        folder: the folder.
        about: of its ``export.json``.
        name: of the model that it came from: an embedded name or a hub name.
        data: what else it says.
    """
    embedded = MODELS.get(name or "")
    base = embedded.hub_name if embedded else name
    license = data.license or (embedded.licence.lower() if embedded else None)
    metadata = ModelCardData(
        base_model=base if base and "/" in base else None,  # of a folder only its name is known
        license=license,
        library_name="gguf" if about["format"] == "gguf" else "transformers",
        pipeline_tag="text-generation",
        tags=["depthprune", "depth-pruning", "pruned"],
    )
    content = f"---\n{metadata.to_yaml()}\n---\n\n{_text(about, base, embedded is not None, data.losses)}"
    ModelCard(content, ignore_metadata_errors=True).save(folder / CARD)


def _text(about: Mapping[str, Any], base: str | None, is_embedded: bool, losses: list[list[str]]) -> str:
    plan = PruningPlan.from_dict(about["plan"])
    sizes, cache, proof = about["parameters"], about["cache_bytes_per_token"], about["proof"]
    source = f"`{base}`" if base else "a causal language model"
    if is_embedded:
        source += " (dequantised from Q4_1)"
    parts = [
        f"# {base.rpartition('/')[2] if base else 'A model'} without {_gone(plan)}",
        f"Made from {source} by depthprune, which removes depth from a pretrained model (arXiv 2407.16286).",
        "## What was removed",
        table(
            ["sites", "in their place"],
            [[", ".join(map(str, removal.sites)), _standing(removal)] for removal in plan.removals],
            words=2,
        ),
        "## What it takes",
        table(
            ["", "this model", "unpruned"],
            [
                ["parameters", f"{sizes['exported']:,}", f"{sizes['unpruned']:,}" if sizes["unpruned"] else "–"],
                ["bytes of the weights", f"{about['weight_bytes']:,}", "–"],
                ["bytes of the cache per token", f"{cache['exported']:,.0f}", f"{cache['unpruned']:,.0f}"],
            ],
        ),
    ]
    if losses:
        parts += [
            "## What it can do",
            "Loss on held-out text in nats per token, with the 95 % interval of the difference.",
            table(["text", "model", "unpruned", "above it"], losses, words=2),
        ]
    parts += ["## How to load it", _loading(about), _proof(proof)]
    return "\n\n".join(parts) + "\n"


def _gone(plan: PruningPlan) -> str:
    counts = {kind: sum(site.kind == kind for site in plan.sites) for kind in ("block", "attention", "mlp")}
    names = {"block": "blocks", "attention": "attentions", "mlp": "MLPs"}
    return " and ".join(
        f"{count} {names[kind] if count > 1 else names[kind][:-1]}" for kind, count in counts.items() if count
    )


def _standing(removal: Any) -> str:
    options = ", ".join(f"{name} {value}" for name, value in removal.options.items())
    what = "nothing" if removal.is_bare else removal.replacement.replace("_", " ")
    return escaped(f"{what} ({options})" if options else what)


def _losses(variants: Mapping[str, Any]) -> list[list[str]]:
    if UNPRUNED not in variants or len(variants) < 2:
        raise ValueError("The evaluation for the card needs the unpruned model and another one in it.")
    rows = []
    for domain, sums in variants[UNPRUNED]["domains"].items():
        base = DomainLoss.from_dict(sums)
        for name, measured in variants.items():
            if name != UNPRUNED:
                gap = DomainLoss.from_dict(measured["domains"][domain]).minus(base)
                shown = f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
                rows.append([escaped(domain), escaped(name), f"{base.loss:.3f}", shown])
    if not rows:
        raise ValueError("The evaluation for the card has no texts in it: name one with domains.")
    return rows


def _loading(about: Mapping[str, Any]) -> str:
    if about["format"] == "gguf":
        return "```\nllama-cli -m model.gguf\n```"
    arguments = "FOLDER, trust_remote_code=True" if about["format"] in HAVE_CODE else "FOLDER"
    code = "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    code += f"model = AutoModelForCausalLM.from_pretrained({arguments})\n"
    code += f"tokenizer = AutoTokenizer.from_pretrained({arguments})\n```"
    if about["format"] == "nemotron-nas":
        code += "\n\n```\nvllm serve FOLDER --trust-remote-code\n```"
    return code


def _proof(proof: Mapping[str, Any]) -> str:
    if proof["kind"] == "structure":
        return "The file was checked tensor by tensor; no engine ran it where it was made."
    return (
        f"Opened anew, its logits differ from those of the model that it was made from by up to "
        f"{proof['logits_difference']:.1e} on {proof['tokens']} tokens (the largest is {proof['largest_logit']:.0f}), "
        f"and {proof['generated_alike']:.0%} of the texts that both write are the same."
    )


def check_repository(name: str) -> None:
    """Refuse a name that the hub cannot have.

    Raises:
        ValueError: it is none.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"The hub has no name {name!r} to upload to: name it owner/name.") from error


def push(folder: Path, repository: str, is_private: bool) -> str:
    """Upload an exported folder to the hub.

    Args:
        folder: the folder.
        repository: ``owner/name``.
        is_private: whether only its owner sees it.

    Returns:
        Its address.

    Raises:
        ValueError: the hub cannot be reached or refuses; the folder stays.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=is_private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Exported by depthprune")
    except Exception as error:  # whatever the hub, and the libraries on the way to it, make of a failure
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"{folder} could not be uploaded to {repository} ({reason}): it is complete all the same; log in with "
            f"`hf auth login` and run `hf upload {repository} {folder}`."
        ) from error
    return str(address)
