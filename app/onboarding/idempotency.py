"""The Idempotency-Key of a request (draft-ietf-httpapi-idempotency-key-header-07)."""

import hashlib
from dataclasses import dataclass


@dataclass(slots=True)
class IdempotentRequest:
    """A request that its sender may repeat.

    `scope` is the SHA-256 of who asks for what under which key, in hex: it names the record.
    `fingerprint` is the SHA-256 of what was sent, in hex: a record with another one belongs to
    another request. `replayed` is set by the store when it gives the first answer again.
    """

    scope: str
    fingerprint: str
    replayed: bool = False

    def add_body(self, checksum: str) -> None:
        """Complete the fingerprint of a request whose body was only seen piece by piece."""
        sent = f"{self.fingerprint}{checksum}"
        self.fingerprint = hashlib.sha256(sent.encode()).hexdigest()

    @classmethod
    def of(
        cls, *, caller: str, method: str, path: str, key: str, query: bytes, body: bytes
    ) -> "IdempotentRequest":
        """Derive both digests from a request."""
        scope = "\n".join((caller, method, path, key))
        sent = b"%d\n%b%b" % (len(query), query, body)
        return cls(
            scope=hashlib.sha256(scope.encode()).hexdigest(),
            fingerprint=hashlib.sha256(sent).hexdigest(),
        )
