"""What a checkpoint of a recovery holds: replacements, their plan, and what resuming must not change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from depthprune.recovery.resume import check_checkpoint, fit_settings, number_optimizer_states, run_settings
from depthprune.recovery.scoring import DomainScoring
from depthprune.sites import PruningPlan
from depthprune.surgery import replacement_state


class ReplacementCheckpoints(DomainScoring):
    """A module whose checkpoints hold the replacements and nothing of the base.

    Attributes:
        plan: what is removed, and what stands there.
        is_calibrated: whether the replacements have their weights.
        base_weights: a hash of the base model's, once it is there.
        start_weights: what training started from, by parameter name.
    """

    plan: PruningPlan

    def __init__(self) -> None:
        super().__init__()
        self.is_calibrated = False
        self.base_weights = ""
        self.start_weights: dict[str, Tensor] = {}
        self._dropout_seed: int | None = None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Every parameter and buffer of the replacements, and nothing of the base."""
        return {f"model.{key}": value for key, value in replacement_state(self.causal_lm).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take the replacements from a checkpoint.

        Raises:
            ValueError: it lacks a replacement of this plan, or holds another one.
        """
        expected = set(self.state_dict())
        if expected != set(state_dict):
            raise ValueError(
                f"The checkpoint is for other replacements: it lacks {sorted(expected - set(state_dict))[:3]} and has "
                f"{sorted(set(state_dict) - expected)[:3]} too many. Use the plan and replacement it was made with."
            )
        self.is_calibrated = True
        try:
            return nn.Module.load_state_dict(self, state_dict, strict=False, assign=assign)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"The checkpoint's tensors have other shapes ({reason}): name another one.") from error

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the plan and what resuming must not change."""
        checkpoint["depthprune"] = {
            "plan": self.plan.to_dict(),
            "settings": run_settings(self),
            "fit_settings": fit_settings(self),
            "dropout_seed": self._dropout_seed,
            "base_weights": self.base_weights,
            "start_weights": self.start_weights,
        }
        number_optimizer_states(self, checkpoint, saving=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with other settings than the run was started with.

        Raises:
            ValueError: the checkpoint is none of depthprune's, or a setting differs.
        """
        check_checkpoint(self, checkpoint)
        number_optimizer_states(self, checkpoint, saving=False)
        self._dropout_seed = checkpoint["depthprune"]["dropout_seed"]
        self.start_weights = checkpoint["depthprune"]["start_weights"]
