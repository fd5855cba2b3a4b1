"""Signed JSON statements: in-toto Statement v1 in a DSSE envelope, signed with ECDSA on P-256 and SHA-256.

    {"payload": base64 of the statement, "payloadType": "application/vnd.in-toto+json",
     "signatures": [{"keyid": "", "sig": base64}]}

Signatures are deterministic (RFC 6979), so equal statements and keys give equal bytes, and nothing can be hidden in the
choice of a random number.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedqsn_cli import strictjson
from fedqsn_cli.crypto.keys import SigningKey, VerifyKey
from fedqsn_cli.errors import FormatError, SignatureError

STATEMENT = "https://in-toto.io/Statement/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
LARGEST = 1 << 24  # bytes of a file with an envelope

_SHA256 = hashes.SHA256()


def statement(subjects: list[dict[str, Any]], predicate_type: str, predicate: dict[str, Any]) -> bytes:
    """An in-toto statement as canonical JSON.

    Args:
        subjects: resource descriptors, each with a name and digests.
    """
    document = {"_type": STATEMENT, "subject": subjects, "predicateType": predicate_type, "predicate": predicate}
    return strictjson.dumps(document).encode()


def sign(payload: bytes, key: SigningKey) -> bytes:
    """The signature of a statement: ECDSA in DER."""
    return key.sign(pre_authentication(payload), ec.ECDSA(_SHA256, deterministic_signing=True))


def envelope(payload: bytes, signature: bytes) -> dict[str, Any]:
    """The envelope of a signed statement."""
    signatures = [{"keyid": "", "sig": base64.b64encode(signature).decode()}]
    return {"payload": base64.b64encode(payload).decode(), "payloadType": PAYLOAD_TYPE, "signatures": signatures}


def pre_authentication(payload: bytes) -> bytes:
    """What is signed: type and statement with their lengths (DSSE 1.0)."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def opened(document: Any, key: VerifyKey, predicate_type: str, where: object) -> tuple[dict[str, Any], bytes]:
    """The statement of an envelope, and its signature, verified.

    Args:
        document: the envelope. predicate_type: what the statement must be about.

    Raises:
        SignatureError: it was not signed with the key. FormatError: it is malformed, or about something else.
    """
    payload, signature = _parts(document, where)
    try:
        key.verify(signature, pre_authentication(payload), ec.ECDSA(_SHA256))
    except InvalidSignature:
        raise SignatureError("the signature is false, or was made with another key", where=where) from None
    told = strictjson.loads(payload, where)
    if not isinstance(told, dict) or told.get("_type") != STATEMENT or told.get("predicateType") != predicate_type:
        raise FormatError(f"the signed statement is not a {predicate_type}", where=where)
    return told, signature


def _parts(document: Any, where: object) -> tuple[bytes, bytes]:
    """Payload and signature, not verified yet. Raises FormatError."""
    try:
        if document["payloadType"] != PAYLOAD_TYPE:
            raise FormatError(f"the envelope holds no {PAYLOAD_TYPE}", where=where)
        (one,) = document["signatures"]
        return base64.b64decode(document["payload"], validate=True), base64.b64decode(one["sig"], validate=True)
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise FormatError("is not an envelope with one signature", where=where) from None
