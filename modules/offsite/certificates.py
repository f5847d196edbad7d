"""Certificates and tokens for a trial: one self-signed certificate for the owner, which parties trust, and a token each."""

import datetime
import ipaddress
import json
import os
import secrets
from pathlib import Path

from ...errors import InputError
from ...files import write_atomic


def make_certificates(folder: Path, *, hosts: list[str], parties: list[str], days: float = 30) -> None:
    """Write ``owner.crt`` (for everyone), ``owner.key`` and ``tokens.json`` (for the owner), and ``<party>.token`` each.

    Without hosts, tokens of further parties are added to a folder that has a certificate.

    Args:
        folder: To write to.
        hosts: Names or addresses at which parties will reach the owner; none to add parties.
        parties: Names of the parties.
        days: For which the certificate is good.

    Raises:
        InputError: If a file is there already, there is no party, or no host for a new certificate.
    """
    folder = Path(folder)
    if not parties or len(set(parties)) < len(parties) or not all(name.isidentifier() for name in parties):
        raise InputError(f"parties={parties}: give one or more; their names are letters, digits and _, each once.")
    if not hosts and not (folder / "tokens.json").is_file():
        raise InputError(f"hosts={hosts}: a new certificate needs a name or address at which parties reach the owner.")
    names = [*(("owner.crt", "owner.key", "tokens.json") if hosts else ()), *(f"{party}.token" for party in parties)]
    there = [name for name in names if (folder / name).exists()]
    if there:
        raise InputError(f"{folder} has {', '.join(there)} already. Give another folder, or add parties without hosts.")
    tokens = {party: secrets.token_urlsafe(32) for party in parties}
    known = {} if hosts else json.loads((folder / "tokens.json").read_text("utf-8"))
    certificate, secret = _self_signed(hosts, days) if hosts else (b"", b"")
    mask = os.umask(0o077)  # nobody else may read these, not even for a moment
    try:
        if hosts:
            write_atomic(folder / "owner.key", secret)
        write_atomic(folder / "tokens.json", json.dumps({**known, **tokens}, indent=2) + "\n")
        for party, token in tokens.items():
            write_atomic(folder / f"{party}.token", token + "\n")
    finally:
        os.umask(mask)
    if hosts:
        write_atomic(folder / "owner.crt", certificate)


def _self_signed(hosts: list[str], days: float) -> tuple[bytes, bytes]:
    """Return a certificate and its private key, PEM."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID
    except ImportError as error:
        raise InputError("Certificates need the extra offsite: pip install 'fulgurite[offsite]'.") from error

    def named(host: str) -> x509.GeneralName:
        try:
            return x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            return x509.DNSName(host)

    key = ec.generate_private_key(ec.SECP256R1())
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fulgurite owner")])
    now = datetime.datetime.now(datetime.UTC)
    alternatives = x509.SubjectAlternativeName([named(host) for host in hosts])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(own)
        .issuer_name(own)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + datetime.timedelta(days=days)) - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(alternatives, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(serialization.Encoding.PEM), secret
