"""FQ013: is a signature that of the owner, and does it hold nothing else?

A signature cannot be made again without the private key. So it is verified, spelled again from the folder's digests,
and, where the private key is given, made again: then nothing can be hidden in the number that every signature chooses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from fedqsn_cli.artifacts.manifests import SIGNATURE
from fedqsn_cli.auditing.checks import check, each_folder
from fedqsn_cli.auditing.digests import digests_of
from fedqsn_cli.auditing.findings import Entry, Finding
from fedqsn_cli.auditing.inputs import PROXY, Inputs, ProxyFolder
from fedqsn_cli.auditing.registry import EXPORT_AGAIN, Rule
from fedqsn_cli.crypto.keys import SigningKey, VerifyKey, load_signing_key, load_verify_key, public_pem
from fedqsn_cli.crypto.signature import expected_bytes, signed_bytes, signed_statement, verify_folder
from fedqsn_cli.errors import FormatError, SignatureError
from fedqsn_cli.options import AuditOptions

FALSE_SIGNATURE = Rule(
    "FQ013",
    "false-signature",
    "hard",
    what="With --verify-key, every proxy is signed with that key, for exactly the files that are in it; a signature "
    "has no byte that these do not explain. With --sign it is made again, and must be the same.",
    why="Without the owner's signature a proxy may be anybody's, and a file that nobody checks may carry anything.",
    fix="Export the proxy again with the same options and `--sign`. " + EXPORT_AGAIN.split(". ")[0] + ".",
    scope="invariants",
    needs=(PROXY,),
)
_UNSIGNED = "it has no signature, and none was asked for"
_UNKNOWN = "it is signed; give --verify-key, or --sign, to have the signature verified"
_CHOSEN = (
    "its signature is valid, but holds 32 bytes that only the owner of the private key can explain; give --sign to "
    "have it made again"
)


@dataclass(frozen=True, slots=True)
class Signers:
    """The keys of an audit.

    Args:
        verify: that the proxies must be signed with. sign: its private half, if that was given.
    """

    verify: VerifyKey | None
    sign: SigningKey | None

    @classmethod
    def of(cls, options: AuditOptions) -> Self:
        """The keys that options name. Raises KeyFileError."""
        sign = load_signing_key(options.sign) if options.sign is not None else None
        given = load_verify_key(options.verify_key) if options.verify_key is not None else None
        verify = given or (sign.public_key() if sign is not None else None)
        pair = sign is not None and verify is not None and public_pem(sign.public_key()) == public_pem(verify)
        return cls(verify, sign if pair else None)


@check(FALSE_SIGNATURE, each_folder, problem="the signature cannot be checked", failed="the signature is unreadable")
def signature(inputs: Inputs, folder: ProxyFolder) -> Iterator[Entry]:
    """Verify the signature of a folder, and that it is spelled as exports do."""
    signers, scope = inputs.shared("signers", lambda: Signers.of(inputs.options)), folder.scope
    if not os.path.lexists(folder.folder / SIGNATURE) and inputs.options.verify_key is None:
        yield from FALSE_SIGNATURE.checked(scope, _UNSIGNED)
    elif signers.verify is None:
        yield FALSE_SIGNATURE.not_run(scope, _UNKNOWN)
    else:
        found = list(_problems(inputs, folder, signers.verify, signers.sign))
        yield from FALSE_SIGNATURE.checked(scope, "the signature was verified and spelled again", found)
        if not found and signers.sign is None:
            yield replace(FALSE_SIGNATURE.finding(scope, _CHOSEN), severity="info")


def _problems(inputs: Inputs, folder: ProxyFolder, key: VerifyKey, private: SigningKey | None) -> Iterator[Finding]:
    path, digests = folder.folder / SIGNATURE, digests_of(inputs, folder)
    try:
        verify_folder(folder.folder, key, digests)
        _, made = signed_statement(path, key)
    except (SignatureError, FormatError) as error:
        yield FALSE_SIGNATURE.finding(folder.scope, f"the signature is refused: {error.what}")
        return
    others = {name: digest for name, digest in digests.items() if name != SIGNATURE}
    expected = signed_bytes(others, private) if private is not None else expected_bytes(others, made, key)
    if path.read_bytes() != expected:
        yield FALSE_SIGNATURE.finding(folder.scope, f"{SIGNATURE} is not the one that an export writes for this proxy")
