"""Who made a picture: its recipe and its pixels signed with an Ed25519 key (RFC 8032), the signature in the recipe.

Signed are the recipe's canonical JSON (sorted keys, no spaces, UTF-8, numbers as Python writes them) and the pixels'
SHA-256, so that either one's change is told apart. A signature says which key signed, not whose that is. Needs the
package cryptography. Letters: H W pixels.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NAME = "signature"  # in a recipe
ALGORITHM = "Ed25519"


@dataclass(frozen=True)
class Report:
    """Whether a picture is as it was signed, and by which public key (base64). `by` is None where nobody signed."""

    by: str | None
    pixels_same: bool = False
    recipe_same: bool = False

    @property
    def sound(self) -> bool:
        return self.by is not None and self.pixels_same and self.recipe_same


def pixels_hash(pixels: np.ndarray) -> str:
    """SHA-256 of "WIDTH HEIGHT\\n" and the RGB bytes, row by row; pixels (H, W, 3) uint8."""
    head = f"{pixels.shape[1]} {pixels.shape[0]}\n".encode()
    return hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def canonical(content: Mapping[str, Any]) -> bytes:
    """One spelling of JSON for one content; ValueError where a number is not finite."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def signed(recipe: Mapping[str, Any], pixels: np.ndarray, key: Any) -> dict[str, Any]:
    """The recipe with a signature over itself and the pixels (H, W, 3) uint8; `key` is of `load_key`."""
    plain = {name: value for name, value in recipe.items() if name != NAME}
    digest = pixels_hash(pixels)
    value = key.sign(_message(plain, digest))
    told = {"algorithm": ALGORITHM, "by": public_text(key), "pixels": digest, "value": _base64(value)}
    return {**plain, NAME: told}


def verify(pixels: np.ndarray, recipe: Mapping[str, Any]) -> Report:
    """What can be said of a picture and its recipe. ValueError where the signature is damaged beyond reading."""
    told = recipe.get(NAME)
    if told is None:
        return Report(None)
    if not isinstance(told, dict) or told.get("algorithm") != ALGORITHM:
        raise ValueError(f"signature: of a kind that is not known; {ALGORITHM} is")
    try:
        public, value = (base64.b64decode(told[name], validate=True) for name in ("by", "value"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"signature: damaged ({error})") from error
    if len(public) != 32 or len(value) != 64:  # RFC 8032, 5.1.5 and 5.1.6
        raise ValueError(f"signature: damaged (a key of {len(public)} bytes, a value of {len(value)})")
    digest = str(told.get("pixels"))
    plain = {name: value for name, value in recipe.items() if name != NAME}
    same = _fits(public, value, _message(plain, digest))
    return Report(_base64(public), pixels_hash(pixels) == digest, same)


def new_key(path: Path) -> str:
    """Make a key: the private one at `path`, for its owner's eyes only (0600), the public one beside it as PATH.pub.

    Returns the public key (base64). FileExistsError where either is there.
    """
    keys, codes = _cryptography()
    key = keys.Ed25519PrivateKey.generate()
    public = path.with_name(path.name + ".pub")
    if public.exists():
        raise FileExistsError(17, "it is there already", str(public))
    text = key.private_bytes(codes.Encoding.PEM, codes.PrivateFormat.PKCS8, codes.NoEncryption())
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(text)
    public.write_text(public_text(key) + "\n", encoding="ascii")
    return public_text(key)


def load_key(path: str | Path) -> Any:
    """The private key of a PEM file; ValueError where it is none."""
    keys, codes = _cryptography()
    try:
        key = codes.load_pem_private_key(Path(path).read_bytes(), password=None)
    except OSError as error:
        raise ValueError(f"key={str(path)!r}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"key={str(path)!r}: no private key in PEM without a password") from error
    if not isinstance(key, keys.Ed25519PrivateKey):
        raise ValueError(f"key={str(path)!r}: a key of another kind; {ALGORITHM} is needed")
    return key


def load_public(path: str | Path) -> str:
    """The public key (base64) of a .pub file; ValueError where it is none."""
    try:
        text = Path(path).read_text(encoding="ascii").strip()
        if len(base64.b64decode(text, validate=True)) == 32:
            return text
    except OSError as error:
        raise ValueError(f"key={str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"key={str(path)!r}: no public key; the .pub file is needed ({error})") from error
    raise ValueError(f"key={str(path)!r}: no public key of 32 bytes; the .pub file is needed")


def public_text(key: Any) -> str:
    """The public key of a private one, 32 bytes as base64."""
    return _base64(key.public_key().public_bytes_raw())


def _message(recipe: Mapping[str, Any], digest: str) -> bytes:
    return canonical({"pixels": digest, "recipe": recipe, "what": "sfumato picture 1"})


def _fits(public: bytes, value: bytes, message: bytes) -> bool:
    keys, _ = _cryptography()
    wrong = importlib.import_module("cryptography.exceptions").InvalidSignature
    try:
        keys.Ed25519PublicKey.from_public_bytes(public).verify(value, message)
    except wrong:
        return False
    return True


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _cryptography() -> tuple[Any, Any]:
    """The package's Ed25519 keys and its codes for files; ValueError where it is not installed."""
    if importlib.util.find_spec("cryptography") is None:
        raise ValueError("sign: the package cryptography is needed; install sfumato[safety]")
    base = "cryptography.hazmat.primitives"
    return importlib.import_module(f"{base}.asymmetric.ed25519"), importlib.import_module(f"{base}.serialization")
