"""What the owner orders of a site, signed: to train one proxy, whose sealed file is described part by part.

Whoever carries an order cannot change it, attach it to another proxy, or send more than it says: a site reads it before
it fetches a byte.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

from fedqsn_cli import strictjson, validate
from fedqsn_cli.courier.parts import Parts
from fedqsn_cli.crypto import dsse
from fedqsn_cli.crypto.keys import SigningKey, VerifyKey
from fedqsn_cli.errors import FormatError, InputError
from fedqsn_cli.options import ProposalOptions

PREDICATE = "fedqsn-order/1"


@dataclass(frozen=True, slots=True)
class Order:
    """One client's part in a round.

    Args:
        client: its name. proxy_sha256: of proxy.json. folder_sha256: of the proxy's folder, as an audit names it.
        sealed: the sealed proxy. proposal: how to train; the site may refuse it.
    """

    client: str
    proxy_sha256: str
    folder_sha256: str
    sealed: Parts
    proposal: ProposalOptions

    def signed(self, key: SigningKey) -> str:
        """As text."""
        subject = {"name": "proxy.json", "digest": {"sha256": self.proxy_sha256}}
        predicate = {
            "client": self.client,
            "folder": self.folder_sha256,
            "sealed": self.sealed.to_document(),
            "training": asdict(self.proposal),
        }
        payload = dsse.statement([subject], PREDICATE, predicate)
        return strictjson.dumps(dsse.envelope(payload, dsse.sign(payload, key)))

    @classmethod
    def opened(cls, text: str | bytes, key: VerifyKey, where: object = "order") -> Self:
        """Verify an order.

        Raises:
            SignatureError: the owner did not sign it. FormatError: it is malformed.
        """
        told, _ = dsse.opened(strictjson.loads(text, where), key, PREDICATE, where)
        try:
            (subject,) = told["subject"]
            predicate = told["predicate"]
            return cls(
                client=validate.client(predicate["client"]),
                proxy_sha256=str(subject["digest"]["sha256"]),
                folder_sha256=str(predicate["folder"]),
                sealed=Parts.from_document(predicate["sealed"]),
                proposal=_proposal(predicate["training"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError, InputError) as error:
            raise FormatError(f"the order is malformed ({error})", where=where) from None


def _proposal(fields: dict[str, Any]) -> ProposalOptions:
    """Checked as the owner's command line was. Raises InputError, TypeError."""
    return ProposalOptions(**fields)
