"""Options of a client who limits what an update tells about the training data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fedqsn_cli import validate
from fedqsn_cli.errors import InputError
from fedqsn_cli.options.declare import Option, Options

PRIVACY = "Privacy of the data"


def probability(value: float, flag: str) -> float:
    """A probability above 0 and below 1."""
    if not 0 < value < 1:
        raise InputError(f"{value:g} is not a probability", where=flag, hint="give a number such as 1e-5")
    return value


@dataclass(frozen=True, kw_only=True)
class PrivacyOptions(Options):
    """Differential privacy of the examples (DP-SGD), and of the data set as a whole (noise on the update).

    Raises:
        InputError: an option is missing that another one needs.
    """

    dp_epsilon: Annotated[
        float | None,
        Option("Train with differential privacy (DP-SGD), up to this ε.", PRIVACY, check=validate.more_than_zero),
    ] = None
    dp_delta: Annotated[
        float | None, Option("δ of --dp-epsilon; less than 1 / examples.", PRIVACY, check=probability)
    ] = None
    dp_clip: Annotated[
        float | None,
        Option("Clip the gradient of each example to this norm.", PRIVACY, check=validate.more_than_zero),
    ] = None
    clip_norm: Annotated[
        float | None,
        Option("Clip the whole update to this norm, in the model's scale.", PRIVACY, check=validate.more_than_zero),
    ] = None
    noise_multiplier: Annotated[
        float | None,
        Option("Add noise of this many times --clip-norm to each number.", PRIVACY, check=validate.more_than_zero),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        together = {"--dp-epsilon": self.dp_epsilon, "--dp-delta": self.dp_delta, "--dp-clip": self.dp_clip}
        missing = [flag for flag, value in together.items() if value is None]
        if 0 < len(missing) < len(together):
            raise InputError("is needed for differential privacy", where=missing[0])
        if self.noise_multiplier is not None and self.clip_norm is None:
            raise InputError(
                "needs --clip-norm", where="--noise-multiplier", hint="noise hides nothing without a limit"
            )

    @property
    def withholds(self) -> bool:
        """Whether the update must say nothing else that was computed from the data, such as losses."""
        return self.dp_epsilon is not None or self.noise_multiplier is not None
