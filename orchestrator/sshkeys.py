"""Pairs of SSH keys, in the files that OpenSSH has them in."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from orchestrator import paths


def make(private: Path, comment: str) -> None:
    """Make a pair, ``private`` and beside it its public key."""
    paths.make_dir(private.parent)
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    paths.write_atomic(_public(private), f"{public.decode()} {comment}\n")
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    paths.write_atomic(private, secret, 0o600)


def public_key(private: Path) -> str:
    """The public key of ``private``, as a line of an ``authorized_keys`` file."""
    return _public(private).read_text().strip()


def remove(private: Path) -> None:
    for file in (private, _public(private)):
        file.unlink(missing_ok=True)


def _public(private: Path) -> Path:
    return private.with_suffix(".pub")
