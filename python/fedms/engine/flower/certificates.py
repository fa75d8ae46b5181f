"""Certificates for a deployment: `python -m fedms.engine.flower.certificates DIR --host NAME --clients N`.

Writes an authority of your own (ca.crt, ca.key), the SuperLink's certificate (server.pem, server.key), and a key pair
for each client's SuperNode (client-0, client-0.pub, ...). A client gets ca.crt and its own key; ca.key stays where it
was made. Elliptic-curve P-384 throughout, which is what Flower's SuperNode authentication takes.
"""
from __future__ import annotations

import argparse
import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAYS = 365
LOOPBACK = "127.0.0.1"      # by which a SuperLink's own processes reach it


def make(folder: Path, hosts: Sequence[str], clients: int) -> None:
    """Writes what is missing; never replaces a key. `hosts`: the SuperLink's names and addresses for others.

    Raises:
        FileExistsError: if there are certificates for other hosts already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hosts = list(dict.fromkeys([*hosts, LOOPBACK]))
    if not (folder / "server.pem").exists():
        _authority_and_server(folder, hosts)
    elif set(found := _hosts(folder)) != set(hosts):
        raise FileExistsError(f"{folder}: its certificate is for {', '.join(found)}, not for {', '.join(hosts)}; "
                              "make them in another folder, or remove this one")
    for client in range(clients):
        path = folder / f"client-{client}"
        if not path.exists():
            key = ec.generate_private_key(ec.SECP384R1())
            _write_key(path, key, serialization.PrivateFormat.OpenSSH)
            path.with_suffix(".pub").write_bytes(key.public_key().public_bytes(
                serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) + b"\n")


def _authority_and_server(folder: Path, hosts: Sequence[str]) -> None:
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedMS deployment")])
    certificate = _signed(issuer, issuer, authority.public_key(), authority, [
        (x509.BasicConstraints(ca=True, path_length=0), True),
        (x509.KeyUsage(digital_signature=False, content_commitment=False, key_encipherment=False,
                       data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
                       encipher_only=False, decipher_only=False), True),
        (x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), False)])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
    own = _signed(subject, issuer, server.public_key(), authority, [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.SubjectAlternativeName([_alternative(host) for host in hosts]), False),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), False)])
    _write_key(folder / "ca.key", authority, serialization.PrivateFormat.PKCS8)
    _write_key(folder / "server.key", server, serialization.PrivateFormat.PKCS8)
    (folder / "ca.crt").write_bytes(certificate)
    (folder / "server.pem").write_bytes(own)        # last: its presence says that the others are there


def _signed(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, by: ec.EllipticCurvePrivateKey,
            extensions: Sequence[tuple[x509.ExtensionType, bool]]) -> bytes:
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(
        issuer, subject, key, x509.random_serial_number(), now - datetime.timedelta(minutes=5),
        now + datetime.timedelta(days=DAYS))
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


def _hosts(folder: Path) -> list[str]:
    certificate = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fedms.engine.flower.certificates", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--host", action="append", required=True, help="name or address of the SuperLink; may be repeated")
    parser.add_argument("--clients", type=int, default=0, metavar="N", help="key pairs for clients 0 to N - 1")
    arguments = parser.parse_args()
    try:
        make(arguments.folder, arguments.host, arguments.clients)
    except (OSError, ValueError) as error:
        raise SystemExit(f"certificates: {error}") from None
    print(f"{arguments.folder}: ca.crt, server.pem, server.key, and keys of {arguments.clients} clients, "
          f"valid for {DAYS} days")


if __name__ == "__main__":
    main()
