"""API keys: who may ask, and which models.

A key file has a key a line, with a name before it that goes to logs and metrics in its place, and after it the models
it is for, if not all:

    # made by: python -c "import secrets; print(secrets.token_urlsafe(32))"
    alice:Zk3v…
    bob:9aQe…:eio-resnet20-cifar10,other-model

Only digests of keys are kept in memory, and a key is nowhere logged. The file is read again when it changes; one that
makes no sense leaves the keys as they were, so that a slip of the editor locks nobody out and lets nobody in.
"""

import hashlib
import hmac
import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from serving.errors import RequestError
from serving.operations.log import logger
from zoo import vocabulary
from zoo.errors import BadInput

_LOOK_SECONDS: Final = 1.0
_MAX_FILE_BYTES: Final = 2**20
_KEY: Final = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BEARER: Final = re.compile(rb"[Bb]earer +([A-Za-z0-9._~+/=-]{1,512}) *")
_NOTHING: Final = (0, 0, 0)


@dataclass(frozen=True)
class _Key:
    name: str
    digest: bytes
    models: frozenset[str] | None
    """None is all."""


class Keys:
    """The keys of one file, as it is now."""

    def __init__(self, file: Path, keys: tuple[_Key, ...], version: tuple[int, int, int]) -> None:
        self._file = file
        self._keys = keys
        self._version = version
        self._generation = 1
        self._look_at = time.monotonic() + _LOOK_SECONDS

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a file of keys, and warn if others may read it; BadInput, which shows no key, if it makes no sense."""
        file = Path(path)
        version = _version(file)
        return cls(file, _read(file), version)

    @property
    def generation(self) -> int:
        """Grows when the keys change, after which nothing cached holds; asking looks for that, at most every second."""
        if time.monotonic() >= self._look_at:
            self._look()
        return self._generation

    def check(self, authorization: bytes | None, x_api_key: bytes | None, model: str | None = None) -> str:
        """Return the name of the key that a request brings in a header, if it may ask the `model`, if any.

        All keys are compared, each in constant time, whichever fits. Of `authorization` only `Bearer KEY` counts.

        Raises:
            RequestError: 401 if it brings no key or an unknown one, 403 if its key is not for this model.
        """
        if time.monotonic() >= self._look_at:
            self._look()
        bearer = None if authorization is None else _BEARER.fullmatch(authorization.strip())
        brought = [key for key in (bearer and bearer[1], x_api_key and x_api_key.strip()[:513]) if key]
        if not brought:
            raise _unauthorized("no_key", "no API key; send Authorization: Bearer KEY, or X-API-Key: KEY", b"")
        found = None
        for secret in brought:
            digest = hashlib.sha256(secret).digest()
            for key in self._keys:
                if hmac.compare_digest(digest, key.digest) and found is None:
                    found = key
        if found is None:
            message = "the API key is not one of this server's; ask who runs it for another"
            raise _unauthorized("unknown_key", message, b', error="invalid_token"')
        if model is not None and found.models is not None and model not in found.models:
            allowed = ", ".join(sorted(found.models))
            raise RequestError(
                403, "model_not_allowed", f"the API key {found.name!r} is not for {model[:128]!r}, only for {allowed}"
            )
        return found.name

    def reload(self) -> bool:
        """Read the file again, whatever its date (on SIGHUP); say whether that gave its keys. Errors are logged."""
        version = _version(self._file)
        try:
            keys = _read(self._file)
        except BadInput as error:
            self._version = version  # once is enough
            logger.error("%s; the %d keys from before stay", error, len(self._keys))
            return False
        if keys != self._keys:
            self._keys = keys
            self._generation += 1
            logger.info("%s was read again: %d keys", self._file, len(keys))
        self._version = version
        return True

    def _look(self) -> None:
        """Read the file again if it has changed."""
        self._look_at = time.monotonic() + _LOOK_SECONDS
        if _version(self._file) != self._version:
            self.reload()


def _version(file: Path) -> tuple[int, int, int]:
    """Return what changes when the file does, or when a link points to another one."""
    try:
        found = file.stat()
    except OSError:
        return _NOTHING
    return (found.st_mtime_ns, found.st_size, found.st_ino)


def _read(file: Path) -> tuple[_Key, ...]:
    try:
        with file.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            content = opened.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise BadInput(f"the key file {file} has more than {_MAX_FILE_BYTES} bytes; name another")
        lines = content.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise BadInput(f"cannot read the key file {file} ({error.strerror or error})") from error
    except UnicodeDecodeError:
        raise BadInput(f"the key file {file} is no text") from None  # the error would show what is in it
    keys: dict[str, _Key] = {}
    digests: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key = _key(line.strip(), f"line {number} of the key file {file}", f"line-{number}")
        if key.name in keys:
            raise BadInput(f"line {number} of the key file {file} has the name {key.name!r} again; choose another")
        if key.digest in digests:
            raise BadInput(f"line {number} of the key file {file} has the same key as {digests[key.digest]!r}")
        keys[key.name] = key
        digests[key.digest] = key.name
    if not keys:
        raise BadInput(f"the key file {file} holds no key; write one a line, or leave the setting out")
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("others than its owner may read the key file %s; chmod 600 it", file)
    return tuple(keys.values())


def _key(line: str, where: str, unnamed: str) -> _Key:
    """Read KEY, NAME:KEY or NAME:KEY:MODEL,MODEL. No message shows the line: it may hold a key in the wrong place."""
    parts = [part.strip() for part in line.split(":")]
    if len(parts) > 3:
        raise BadInput(f"{where} has {len(parts) - 1} colons, expected KEY, NAME:KEY or NAME:KEY:MODEL,MODEL")
    name, secret = (unnamed, parts[0]) if len(parts) == 1 else (parts[0], parts[1])
    if not _NAME.fullmatch(name):
        raise BadInput(
            f"{where} begins with no name, expected up to 64 letters, digits, dots, underscores and hyphens before ':'"
        )
    if not _KEY.fullmatch(secret):
        raise BadInput(
            f"{where} has a key of {len(secret)} characters, expected 16 to 512 letters, digits and . _ ~ + / = -; "
            'python -c "import secrets; print(secrets.token_urlsafe(32))" makes one'
        )
    models = None
    if len(parts) == 3:
        models = frozenset(model.strip() for model in parts[2].split(","))
        if not all(vocabulary.NAME.fullmatch(model) for model in models):
            raise BadInput(f"{where} has models that are no names, expected MODEL,MODEL after the second ':'")
    return _Key(name, hashlib.sha256(secret.encode()).digest(), models)


def _unauthorized(reason: str, message: str, more: bytes) -> RequestError:
    return RequestError(401, reason, message, [(b"www-authenticate", b'Bearer realm="manygates"' + more)])
