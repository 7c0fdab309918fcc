"""``depthprune prune``: from influence, or from site names, to a plan and a pruned model."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from depthprune.anatomy import pruning_record, unpruned_fingerprint
from depthprune.block_progress import BlockProgress
from depthprune.data.batches import Batches
from depthprune.data.module import one_text
from depthprune.data.text import RoleShares, TextSource
from depthprune.files import check_new_folder, make_folder, only_writer
from depthprune.influence.table import InfluenceTable
from depthprune.loading import PLAN_FILE, load, load_tokenizer, save
from depthprune.offload import OffloadedModel
from depthprune.progress import tracked
from depthprune.pruning import prune as prune_model
from depthprune.recovery.closed_form import check_closed_form
from depthprune.recovery.fitting import Fitting
from depthprune.recovery.offloaded import prune_offloaded, save_offloaded
from depthprune.recovery.trained import install_trained, read_trained
from depthprune.removal import remove_for_good
from depthprune.sites import PruningPlan
from depthprune.surgery import check_plan
from depthprune.weight_files import check_shard_size


def prune(
    model: str,
    output: str,
    influence: str | None = None,
    metric: str | None = None,
    kinds: Sequence[str] | None = None,
    remove: int | None = None,
    carry_blocks: bool | None = None,
    sites: Sequence[str] | None = None,
    plan: str | None = None,
    replacement: str | None = None,
    options: dict[str, Any] | None = None,
    share_runs: bool = False,
    checkpoint: str | None = None,
    interpolation: float | None = None,
    plan_only: bool = False,
    text: TextSource = TextSource("xsum"),  # noqa: B008 -- frozen
    sequences: int = 32,
    sequence_length: int = 256,
    batch_size: int = 4,
    fitting: Fitting = Fitting(),  # noqa: B008 -- frozen
    shares: RoleShares = RoleShares(),  # noqa: B008 -- frozen
    dtype: str = "auto",
    revision: str | None = None,
    device_map: str | None = None,
    offload: bool = False,
    spill: str | None = None,
    max_shard_size: str | None = None,
) -> None:
    """Make a plan and prune a model for good.

    The plan comes from one of three places: an influence table (with metric, kinds and remove), site names, or a
    plan's file. Replacements are calibrated on the fit role of a text, or taken from a checkpoint of `depthprune fit`.

    Args:
        model: an embedded model's name, a hub name or a folder.
        output: folder for the pruned model, with its plan.json; must not exist or be empty.
        influence: influence.json of `depthprune influence`.
        metric: the table's metric, cosine if not given; the sites of lowest influence go.
        kinds: kinds of site to remove, from a table: block (if not given), attention, mlp.
        remove: how many sites to remove.
        carry_blocks: take the influence of blocks for the attentions or MLPs inside them, as the paper does.
        sites: site names, such as [block.12, attention.3].
        plan: a plan's JSON file.
        replacement: none (if not given), emulated_update, low_rank_adapter, linear and others of `depthprune list`; a
            plan and a checkpoint have their own.
        options: the replacement's options, such as {rank: 16}.
        share_runs: whether a run of adjacent removed blocks has one replacement instead of one for each.
        checkpoint: a checkpoint of `depthprune fit`: its plan and its trained replacements.
        interpolation: take weights that are so far on the way from the closed form (0) to the checkpoint's (1).
        plan_only: write only plan.json.
        text: the text for calibration; its fit role is used.
        sequences: how many sequences to calibrate on.
        sequence_length: tokens of a sequence.
        batch_size: sequences of a batch.
        fitting: how maps (linear, low_rank_adapter) are fitted to the text.
        shares: shares of the documents for the four roles.
        dtype: auto (as saved), bfloat16, float16 or float32.
        revision: branch, tag or commit on the hub.
        device_map: as in transformers, such as auto.
        offload: hold one block at a time, read from the safetensors files, for a model that is larger than memory; for
            none, emulated_update, additive_bias, low_rank_adapter and linear. What was found is saved block by block.
        spill: with offload, a folder on whose disk the streams of the text are kept, for a text that is larger than
            memory.
        max_shard_size: with offload, the size at which files of weights are split; 5GB if not given.
    """
    check(dict(locals()))
    output = str(check_new_folder(output))
    trained = read_trained(checkpoint) if checkpoint else None
    offloaded = None
    if offload:
        offloaded = OffloadedModel(model, dtype, revision)
        causal_lm, tokenizer = offloaded.model, load_tokenizer(model, revision)
    else:
        causal_lm, tokenizer = load(model, dtype=dtype, revision=revision, device_map=device_map)
    if trained is not None:
        chosen, _ = trained
    elif plan is not None:
        chosen = PruningPlan.load(plan)
    elif influence is not None:
        assert remove is not None
        table = InfluenceTable.load(influence)
        if carry_blocks:
            assert kinds
            table = table.carried_to(kinds[0])
        chosen = table.plan(
            metric or "cosine", ("block",) if kinds is None else kinds, remove, replacement or "none", **(options or {})
        )
    else:
        chosen = PruningPlan.of(*(sites or ()), replacement=replacement or "none", **(options or {}))
        chosen = PruningPlan(chosen.removals, unpruned_fingerprint(causal_lm), {"by": "hand"})
    if share_runs:
        chosen = chosen.with_shared_runs()
    if not chosen.sites:
        raise ValueError("The plan removes nothing: name at least one site, such as block.12.")
    check_plan(causal_lm, chosen)
    if trained is None and not plan_only:
        check_closed_form(chosen)
    was_pruned = pruning_record(causal_lm) is not None
    print(f"Removing {', '.join(map(str, chosen.sites))} from {model}.", flush=True)
    if plan_only:
        make_folder(output)
        chosen.save(Path(output) / PLAN_FILE)
        print(f"Wrote the plan to {Path(output) / PLAN_FILE}.\nNext: {_fit_command(model, output)}")
        return
    if trained is not None:
        remove_for_good(causal_lm, install_trained(causal_lm, checkpoint or "", trained[1], interpolation))
    else:
        loader = None
        if any(removal.replacement != "none" for removal in chosen.removals):
            data = one_text(model, text, sequence_length, batch_size, shares, revision, calibration_sequences=sequences)
            loader = data.calibration_dataloader()
        if offloaded is None:
            prune_model(causal_lm, chosen, loader and tracked(loader, "Calibrating"), fitting)
        else:
            _prune_in_files(offloaded, tokenizer, chosen, loader, fitting, Path(output), max_shard_size or "5GB", spill)
    if offloaded is None:
        save(causal_lm, tokenizer, output)
        shutil.rmtree(_progress_of(Path(output)), ignore_errors=True)  # of a run with offload that was not gone on with
    record = pruning_record(causal_lm)
    assert record is not None
    is_plain = PruningPlan.from_dict(record["plan"]).is_plain
    opener = "AutoModelForCausalLM.from_pretrained" if is_plain else "depthprune.load"
    parameters = sum(parameter.numel() for parameter in causal_lm.parameters())
    print(f"Wrote the pruned model ({parameters / 1e6:.1f}M parameters) to {output}: open it with {opener}.")
    print(f"Next: {_score_command(output) if was_pruned else _fit_command(model, output)}")


def check(settings: Mapping[str, Any]) -> None:
    """Refuse settings that do not go together, before anything is opened.

    Args:
        settings: of the command, by name.

    Raises:
        ValueError: some do not.
    """
    given = [name for name in FLAGS if settings[name] is not None]
    if len(given) != 1:
        raise ValueError(
            f"Name the plan's source once: influence, sites, plan or checkpoint; given: {', '.join(given) or 'none'}."
        )
    for flag in dict.fromkeys(("metric", "kinds", "remove", "carry_blocks", *FLAGS["sites"], *FLAGS["checkpoint"])):
        if settings[flag] is not None and flag not in FLAGS[given[0]]:
            raise ValueError(
                f"{flag} does not go with {given[0]}, which has its own or no use for it: leave one of the two out."
            )
    if given == ["influence"] and settings["remove"] is None:
        raise ValueError("Say how many sites to remove: --remove N.")
    if settings["carry_blocks"] and len(settings["kinds"] or ()) != 1:
        raise ValueError("carry_blocks takes one kind: --kinds [attention] or --kinds [mlp].")
    for name in ("max_shard_size", "spill"):
        if settings[name] is not None and not settings["offload"]:
            raise ValueError(f"{name} goes with offload, which holds one block at a time: leave it out.")
    check_shard_size(settings["max_shard_size"] or "5GB")
    if settings["offload"] and (settings["checkpoint"] is not None or settings["device_map"] is not None):
        raise ValueError("With offload one block at a time is in memory: leave checkpoint and device_map out.")
    if settings["share_runs"] and settings["checkpoint"] is not None:
        raise ValueError("share_runs does not go with checkpoint, whose plan says what is shared: leave it out.")


def _prune_in_files(
    offloaded: OffloadedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: PruningPlan,
    text: Batches | None,
    fitting: Fitting,
    output: Path,
    max_shard_size: str,
    spill: str | None,
) -> None:
    """Prune a model whose blocks stay in their files, and write it; a killed run goes on with the same command."""
    settings = {
        "weights": unpruned_fingerprint(offloaded.model).weights,
        "config": offloaded.model.config.to_json_string(),
        "plan": plan.to_dict()["removals"],
        "tokens": None if text is None else [text.fingerprint, len(text)],
        "dtype": str(offloaded.dtype),
        "fitting": asdict(fitting),
        "files": offloaded.files.stamp(),
    }
    room = None if spill is None else make_folder(spill)
    place = make_folder(_progress_of(output))
    with only_writer(place):
        try:
            progress = BlockProgress(place / "constants.safetensors", settings, room)
            if done := max(progress.done, progress.part("maps").done):
                print(f"Going on from {done} blocks that a run before had done.", flush=True)
            with offloaded:
                watch = partial(tracked, label="Blocks")
                prune_offloaded(offloaded, plan, list(text or ()), fitting, watch, progress, room)
            save_offloaded(offloaded, tokenizer, output, max_shard_size, lambda files: tracked(files, "Writing"))
            progress.remove()
        finally:
            if not any(place.glob("constants.*")):  # nothing to go on from
                shutil.rmtree(place, ignore_errors=True)


def _progress_of(output: Path) -> Path:
    """Where a pruning block by block keeps what it has found so far."""
    return output.parent / f".{output.name}.progress"


FLAGS: dict[str, tuple[str, ...]] = {
    "influence": ("metric", "kinds", "remove", "carry_blocks", "replacement", "options"),
    "sites": ("replacement", "options"),
    "plan": (),
    "checkpoint": ("interpolation",),
}
"""What may be said beside each source of a plan."""


def _fit_command(model: str, output: str) -> str:
    command = ["depthprune", "fit", "--config", "configs/fit/quickstart.yaml", "--model.base", model]
    return shlex.join([*command, "--model.plan", str(Path(output) / PLAN_FILE)])


def _score_command(output: str) -> str:
    command = ["depthprune", "influence", "--config", "configs/influence/quickstart.yaml", "--model", output]
    return shlex.join([*command, "--output", f"{output.rstrip('/')}-influence"])
