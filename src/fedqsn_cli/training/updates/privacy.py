"""What a client's options of privacy mean for one round: the noise on its update, and what update.json says of it."""

from __future__ import annotations

from collections.abc import Mapping

from fedqsn_cli.artifacts.manifests import Losses, PrivacyRecord, TrainingPrivacy, UpdatePrivacy
from fedqsn_cli.options.privacy import PrivacyOptions
from fedqsn_cli.training.scoring.scoring import Evaluation
from fedqsn_cli.training.steps.loop import TrainingSummary
from fedqsn_cli.training.updates.update import Differences
from fedqsn_cli.training.updates.update_noise import UpdateNoise


def update_noise(options: PrivacyOptions, differences: Differences, scales: Mapping[str, float]) -> UpdateNoise | None:
    """What is done to the update; None where it stays as it is. `scales` are s by tensor name."""
    if options.clip_norm is None:
        return None
    multiplier = options.noise_multiplier or 0.0
    return UpdateNoise.of(differences.trained_updates(), scales, options.clip_norm, multiplier)


def privacy_record(options: PrivacyOptions, training: TrainingPrivacy | None) -> PrivacyRecord | None:
    """What update.json says; None where nothing was done."""
    update = None
    if options.clip_norm is not None:
        update = UpdatePrivacy(clip_norm=options.clip_norm, noise_multiplier=options.noise_multiplier or 0.0)
    if training is None and update is None:
        return None
    return PrivacyRecord(training=training, update=update)


def reported_losses(
    options: PrivacyOptions, trained: TrainingSummary, before: Evaluation | None, after: Evaluation | None
) -> Losses:
    """The losses in update.json: none where noise hides the data, for they are computed from it without any."""
    if options.withholds:
        return Losses(first=None, last=None, eval_before=None, eval_after=None)
    return Losses(
        first=trained.first_loss,
        last=trained.last_loss,
        eval_before=before.loss if before else None,
        eval_after=after.loss if after else None,
    )
