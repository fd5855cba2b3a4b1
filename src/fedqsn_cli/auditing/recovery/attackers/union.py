"""What all proxies show together, each weight descaled from the first proxy that shows it."""

from fedqsn_cli.auditing.recovery.attackers.attack import Start
from fedqsn_cli.auditing.recovery.attacks import first

UNION = Start(
    name=lambda assembly: "descale" if assembly.alone else "union",
    source="FedQSN, arXiv 2508.18911: the scale n / |V| follows from what is shown",
    applies=lambda assembly: True,
    build=lambda assembly: assembly.estimated(first),
)

SCALED_UNION = Start(
    name=lambda assembly: "union, scaled by what is shown",
    source="inverted dropout, Srivastava et al. 2014",
    applies=lambda assembly: not assembly.alone,
    build=lambda assembly: assembly.scaled(),
)
