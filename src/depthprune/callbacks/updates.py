"""What stands in removed sites beside what was removed, and how far training has moved it."""

from __future__ import annotations

from lightning import LightningModule, Trainer

from depthprune.callbacks.boards import boards, has_board, log_start, write_text
from depthprune.callbacks.forgetting import domain_loaders
from depthprune.callbacks.monitor import RecoveryMonitor, in_training
from depthprune.data.module import TRAIN
from depthprune.recovery.explained import MeasuredUpdates, measure_updates
from depthprune.recovery.figures import similarity_figure, unexplained_figure
from depthprune.recovery.module import RecoveryModule
from depthprune.recovery.start_weights import distance
from depthprune.recovery.updates import compare_updates, spectrum, standing, trained_names
from depthprune.replacements.maps import MapReplacement

TABLE_RANKS = (16, 64)  # of the table beside the figure


class UpdateMonitor(RecoveryMonitor):
    """Logs, at the start and at every validation, how near replacements are to what was removed, and how they move.

    Of each removal in which something stands, named by its first site, on the first validation domain (held out) and,
    with ``_train`` behind the name, on training documents (see :func:`~depthprune.recovery.updates.compare_updates`):

    - ``5_updates/SITE/norm``: mean norm of the replacement's update over that of the removed one.
    - ``5_updates/SITE/cosine``: mean cosine between the two.
    - ``5_updates/SITE/relative_error``: mean norm of their difference over that of the removed one.
    - ``5_updates/SITE/concentration``, ``concentration_removed``: how constant the direction of each is over tokens, 1
      if it is always the same.
    - ``5_updates/SITE/mean_cosine``: the cosine between the mean directions of the two.

    The replacement reads the pruned model's own stream, the removed update is that in the unpruned one. A replacement
    that also makes up for what is lacking before it may well be further from the update than one that does not.

    - ``5_updates/SITE/effective_rank``, ``map_norm``: of a map (see :func:`~depthprune.recovery.updates.spectrum`).
    - ``5_updates/SITE/distance``: how far the trained weights are from their start, over the norm of the start (of a
      start of zeros, the distance itself); also of attentions and MLPs that are refit or healed, which have nothing
      else to compare. ``5_updates/distance`` is that of all together.

    Before the first step, figures in TensorBoard show what a constant and maps of each rank can explain of each removed
    update at best, and how alike the mean updates of all sites of a kind are (see
    :func:`~depthprune.recovery.explained.measure_updates`).

    A comparison costs a forward pass of both models, up to the last removal and with one common prefix. The figures
    cost a pass of the unpruned model over the calibration text, and for each removal about as much as the closed form
    of an adapter.

    Args:
        leave_out_massive: leave tokens with massive activations out of the figures before the first step, where the
            updates of a handful of tokens may outweigh all others; everything else is of all tokens.
    """

    def __init__(self, leave_out_massive: bool = False) -> None:
        self.leave_out_massive = leave_out_massive

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the updates, unless the run was started earlier."""
        assert isinstance(pl_module, RecoveryModule)
        if pl_module.global_step:
            return
        pl_module.print("Comparing what stands in the removed sites with what was removed.")
        log_start(trainer, self._figures(trainer, pl_module))
        if has_board(trainer):
            pl_module.print("Measuring what a constant and maps of each rank could explain of the removed updates.")
            write_measured(trainer, self._measure_before(trainer, pl_module))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare again."""
        if not in_training(trainer):
            return
        assert isinstance(pl_module, RecoveryModule)
        pl_module.log_dict(self._figures(trainer, pl_module), sync_dist=True)

    def _measure_before(self, trainer: Trainer, pl_module: RecoveryModule) -> MeasuredUpdates:
        """What can be explained of the removed updates, on the texts of the closed forms and the held-out one.

        The ridges' text and the held-out one are of the same role and may share sequences: one of nine ridges is all
        that is chosen on them.
        """
        data = pl_module.text_data()
        spans = [removal.sites for removal in pl_module.plan.removals]
        texts = data.calibration_dataloader(), data.tune_dataloader(), next(iter(domain_loaders(trainer).values()))
        with trainer.precision_plugin.val_step_context():
            return measure_updates(pl_module.causal_lm, spans, *texts, leave_out_massive=self.leave_out_massive)

    def _figures(self, trainer: Trainer, pl_module: RecoveryModule) -> dict[str, float]:
        model, plan = pl_module.causal_lm, pl_module.plan
        held_out = next(iter(domain_loaders(trainer).values()))
        train = pl_module.text_data().val_dataloader()[TRAIN]
        figures: dict[str, float] = {}
        with trainer.precision_plugin.val_step_context():
            for ending, loader in (("", held_out), ("_train", train)):
                for site, found in compare_updates(model, plan, pl_module.as_validated(loader)).items():
                    figures |= {f"5_updates/{site}/{name}{ending}": value for name, value in found.items()}
        for site, replacement in standing(model, plan).items():
            if isinstance(replacement, MapReplacement):
                figures |= {f"5_updates/{site}/{name}": value for name, value in spectrum(replacement).items()}
        return figures | self._distances(pl_module)

    def _distances(self, pl_module: RecoveryModule) -> dict[str, float]:
        """How far each site's weights, and all together, are from the start."""
        model, start = pl_module.causal_lm, pl_module.start_weights
        by_site = {
            f"5_updates/{site}/distance": distance(model, {name: start[name] for name in names})
            for site, names in trained_names(model, pl_module.plan).items()
        }
        return {**by_site, "5_updates/distance": distance(model, start)}


def write_measured(trainer: Trainer, measured: MeasuredUpdates) -> None:
    """Write what was measured before training to TensorBoard, as figures and a table."""
    ranks = [rank for rank in TABLE_RANKS if rank < len(next(iter(measured.explained.values())).by_rank)]
    rows = [f"| site | constant |{''.join(f' rank {rank} |' for rank in ranks)} any linear map |"]
    rows.append("|---" * (len(ranks) + 3) + "|")
    for site, found in measured.explained.items():
        shares = [found.constant, *(float(found.by_rank[rank]) for rank in ranks), found.linear]
        rows.append(f"| {site} |{''.join(f' {share:.3f} |' for share in shares)}")
    about = "Share of the mean squared update of each removal that is explained on held-out tokens."
    write_text(trainer, "5_updates/explained", "\n".join([about, "", *rows]))
    for board in boards(trainer):
        board.add_figure("5_updates/unexplained", unexplained_figure(measured.explained), trainer.global_step)
        board.add_figure("5_updates/similarity", similarity_figure(measured.similarity()), trainer.global_step)
