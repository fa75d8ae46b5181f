"""Certificates for a server: an authority of its own (ca.crt, ca.key), and the server's (server.pem, server.key).

A client gets ca.crt, in its invitation; its own key is made on its own machine. Elliptic-curve P-384 throughout, which is
what Flower's authentication of nodes takes. The server's certificate is valid for a year, the authority's for ten. `fedms
server renew` renews what has expired or will within a month, with the same keys: `ca.key` signs. Only where the authority's
own certificate was renewed do the clients need a new invitation.
"""
from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedms.storage.durable import write_durably

DAYS, AUTHORITY_DAYS = 365, 3650     # for which the server's certificate and the authority's are valid
SOON = datetime.timedelta(days=30)   # before the end, when it is told and renewed
NAMES = {"ca.crt": "the authority's certificate", "server.pem": "the server's certificate"}
_ISSUER = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedMS deployment")])
LOOPBACK = "127.0.0.1"      # every certificate is for it too: a first try on one machine


def make(folder: Path, hosts: Sequence[str]) -> list[str]:
    """Write certificates and keys that are missing, and renew certificates that expire within a month. A key is never replaced.

    Args:
        hosts: Names and addresses of the server, as others reach it.

    Returns:
        The names of the certificates that were renewed.

    Raises:
        FileExistsError: If there are certificates for other hosts already.
        FileNotFoundError: If a certificate has to be renewed, and a key that this takes, such as ca.key, is missing.
        ValueError: If a certificate or key cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    hosts = list(dict.fromkeys([*hosts, LOOPBACK]))
    if not (folder / "server.pem").exists():
        _authority_and_server(folder, hosts)
        return []
    if set(found := hosts_of(folder)) != set(hosts):
        raise FileExistsError(f"{folder}: its certificate is for {', '.join(found)}, not for {', '.join(hosts)}; "
                              "make them in another folder, or remove this one")
    return _renew(folder, hosts)


def ends(folder: Path) -> dict[str, datetime.datetime]:
    """Return when each certificate of a folder expires, by file, in UTC.

    Raises:
        OSError, ValueError: If a certificate is missing or cannot be read.
    """
    return {name: _read(folder / name).not_valid_after_utc for name in NAMES}


def warnings(folder: Path) -> list[str]:
    """Return a line for each certificate that has expired or will expire within a month. It raises what `ends` raises."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return [f"{folder / name}: {NAMES[name]} {'has expired' if end <= now else 'expires'} on {end:%Y-%m-%d}; renew it by "
            f"fedms server renew {folder.parent}" for name, end in ends(folder).items() if end <= now + SOON]


def _authority_and_server(folder: Path, hosts: Sequence[str]) -> None:
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    certificates = _authority(authority), _server(authority, server.public_key(), hosts)
    _write_key(folder / "ca.key", authority, serialization.PrivateFormat.PKCS8)
    _write_key(folder / "server.key", server, serialization.PrivateFormat.PKCS8)
    for name, certificate in zip(NAMES, certificates):      # last server.pem: its presence says that the others are there
        write_durably(folder / name, certificate)


def _renew(folder: Path, hosts: Sequence[str]) -> list[str]:
    soon = datetime.datetime.now(datetime.timezone.utc) + SOON
    names = [name for name, end in ends(folder).items() if end <= soon]
    if names:
        authority = _read_key(folder / "ca.key")
        made = {"ca.crt": _authority(authority), "server.pem": _server(authority, _read(folder / "server.pem").public_key(), hosts)}
        for name in names:
            write_durably(folder / name, made[name])
    return names


def _authority(key: ec.EllipticCurvePrivateKey) -> bytes:
    return _signed(_ISSUER, key.public_key(), key, AUTHORITY_DAYS, [
        (x509.BasicConstraints(ca=True, path_length=0), True),
        (x509.KeyUsage(digital_signature=False, content_commitment=False, key_encipherment=False,
                       data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
                       encipher_only=False, decipher_only=False), True),
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)])


def _server(authority: ec.EllipticCurvePrivateKey, key: Any, hosts: Sequence[str]) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
    return _signed(subject, key, authority, DAYS, [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.SubjectAlternativeName([_alternative(host) for host in hosts]), False),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), False)])


def _signed(subject: x509.Name, key: ec.EllipticCurvePublicKey, by: ec.EllipticCurvePrivateKey, days: int,
            extensions: Sequence[tuple[x509.ExtensionType, bool]]) -> bytes:
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(
        _ISSUER, subject, key, x509.random_serial_number(), now - datetime.timedelta(minutes=5),
        now + datetime.timedelta(days=days))
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(by, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    data = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _read(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: no certificate in PEM: {error}") from None


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: is not here, and a certificate must be renewed with it; bring it back from where "
                                "it is kept") from None
    try:
        key = serialization.load_pem_private_key(data, None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: no private key in PEM: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path}: no elliptic-curve key")
    return key


def hosts_of(folder: Path) -> list[str]:
    """Return the names and addresses that the server's certificate is for.

    Raises:
        OSError, ValueError: If it cannot be read.
    """
    names = _read(folder / "server.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]
