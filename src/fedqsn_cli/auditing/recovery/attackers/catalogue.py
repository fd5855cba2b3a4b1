"""All attacks on the function, in the order in which they are tried: the most promising ones first."""

from fedqsn_cli.auditing.recovery.attackers.as_sent import AS_SENT
from fedqsn_cli.auditing.recovery.attackers.averaging import AVERAGING
from fedqsn_cli.auditing.recovery.attackers.base_fill import BASE_FILL
from fedqsn_cli.auditing.recovery.attackers.direction import DIRECTION
from fedqsn_cli.auditing.recovery.attackers.distillation import DISTILLATION
from fedqsn_cli.auditing.recovery.attackers.full import FULL
from fedqsn_cli.auditing.recovery.attackers.healing import HEALING
from fedqsn_cli.auditing.recovery.attackers.low_rank import LOW_RANK
from fedqsn_cli.auditing.recovery.attackers.rounds import DIFFERENCE, ROUNDS, ROUNDS_AVERAGED
from fedqsn_cli.auditing.recovery.attackers.union import SCALED_UNION, UNION

STARTS = (AS_SENT, UNION, SCALED_UNION, BASE_FILL, AVERAGING, DIRECTION, ROUNDS, ROUNDS_AVERAGED, DIFFERENCE)
TRAININGS = (FULL, LOW_RANK, HEALING, DISTILLATION)
