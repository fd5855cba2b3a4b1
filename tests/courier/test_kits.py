"""A kit that cannot connect is refused where it is used, with a reason; FLARE would try again and again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fedqsn_cli.courier import kits
from fedqsn_cli.courier.flare.session import Session
from fedqsn_cli.courier.layout import INVITATION, Invitation
from fedqsn_cli.errors import FormatError, InputError

DAY = timedelta(days=1)


def certificate(path: Path, begins: datetime, ends: datetime) -> x509.Certificate:
    """Write one that signs itself."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, begins, ends)
    made = builder.sign(key, SHA256())
    path.write_bytes(made.public_bytes(Encoding.PEM))
    return made


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A kit whose certificates last a day, beside the invitation that it belongs to."""
    now, startup = datetime.now(UTC), tmp_path / "kit/startup"
    startup.mkdir(parents=True)
    root = certificate(startup / "rootCA.pem", now - DAY, now + DAY)
    certificate(startup / "client.crt", now - DAY, now + DAY)
    told = root.fingerprint(SHA256()).hex(":").upper()
    (tmp_path / INVITATION).write_bytes(Invitation("x", "localhost", 1, f"SHA256:{told}", "").to_bytes())
    return tmp_path / "kit"


@pytest.mark.parametrize("name", ["rootCA.pem", "client.crt"])
@pytest.mark.parametrize(
    ("begins", "ends", "why"),
    [(-9, -3, "has expired on .*this machine's clock is right"), (700, 900, "is not valid before .*clock")],
)
def test_a_certificate_is_used_while_it_is_valid(kit: Path, name: str, begins: int, ends: int, why: str) -> None:
    kits.require_valid(kit)
    Session(kit)
    now = datetime.now(UTC)
    certificate(kit / "startup" / name, now + begins * DAY, now + ends * DAY)
    for use in (kits.require_valid, Session):
        with pytest.raises(InputError, match=why):
            use(kit)


def test_the_kit_of_another_courier_and_a_damaged_one_are_refused(kit: Path) -> None:
    now = datetime.now(UTC)
    certificate(kit / "startup/rootCA.pem", now - DAY, now + DAY)
    with pytest.raises(InputError, match="the kit of another courier"):
        kits.require_valid(kit)
    (kit / "startup/client.crt").write_text("x")
    with pytest.raises(FormatError, match="client.crt: is not a certificate"):
        kits.require_valid(kit)
    (kit / "startup/rootCA.pem").unlink()
    with pytest.raises(InputError, match="no such file"):
        kits.require_valid(kit)


@pytest.mark.parametrize("text", ["{}", "[]", '{"client": []}', '{"components": 5, "snapshot_persistor": 5}', "null"])
def test_settings_that_flare_has_not_made_are_refused(kit: Path, text: str) -> None:
    (kit / "local").mkdir()
    for path, use in (("startup/fed_client.json", kits.client_of), ("local/resources.json", kits.place_server)):
        with pytest.raises(InputError, match="no such file"):
            use(kit)
        (kit / path).write_text(text)
        with pytest.raises(FormatError, match="is not as FLARE makes it; put back the kit"):
            use(kit)
        assert (kit / path).read_text() == text
