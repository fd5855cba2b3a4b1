"""What the owner orders of a site, signed: to train one proxy, whose sealed file is described part by part.

Whoever carries an order cannot change it, attach it to another proxy, or send more than it says: a site reads it before
it fetches a byte.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError

from fedqsn_cli import strictjson
from fedqsn_cli.artifacts.document import Sha256, Strict
from fedqsn_cli.artifacts.ledger import ClientId
from fedqsn_cli.courier.parts import Parts
from fedqsn_cli.crypto import dsse
from fedqsn_cli.crypto.keys import SigningKey, VerifyKey
from fedqsn_cli.errors import FormatError, InputError
from fedqsn_cli.options import ProposalOptions, options_of

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
        (subject,) = _Subjects.from_document({"subject": told.get("subject")}, where).subject
        asked = _Asked.from_document(told.get("predicate"), where)
        return cls(
            client=asked.client,
            proxy_sha256=subject.digest.sha256,
            folder_sha256=asked.folder,
            sealed=Parts.from_document(asked.sealed),
            proposal=_proposal(asked.training, where),
        )


class _Digest(Strict):
    sha256: Sha256  # a site names the folder of a round after it


class _Subject(Strict):
    name: Literal["proxy.json"]
    digest: _Digest


class _Subjects(Strict):
    subject: tuple[_Subject] = Field(strict=False)


class _Asked(Strict):
    client: ClientId
    folder: Sha256
    sealed: list[Any]
    training: dict[str, Any]


def _proposal(fields: dict[str, Any], where: object) -> ProposalOptions:
    """Of the types of the options, and then checked as the owner's command line was. Raises FormatError."""
    kinds = {declared.name: declared.hint for declared in options_of(ProposalOptions)}
    for name, value in fields.items():
        try:
            TypeAdapter(kinds[name]).validate_python(value, strict=True)
        except (KeyError, ValidationError):
            raise FormatError(f"the order is malformed: training.{name}", where=where) from None
    try:
        return ProposalOptions(**fields)
    except InputError as error:
        raise FormatError(f"the order is malformed: {error}", where=where) from None
