"""The proxy as it was sent: what a client has without any work."""

from fedqsn_cli.auditing.recovery.attackers.attack import Start

AS_SENT = Start(
    name=lambda assembly: "as sent",
    source="none needed",
    applies=lambda assembly: True,
    build=lambda assembly: assembly.as_sent(),
)
