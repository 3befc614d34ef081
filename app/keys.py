"""Make a key for a machine: a generator, an operator's tool, a service that begins sessions.

    python -m app.keys bcm generator              a key called bcm, for a generator
    python -m app.keys shop sessions generator    one with two scopes

Two lines come out. The first is the key, which the machine sends as X-API-Key: it is shown this
once and kept nowhere. The second goes into ONBOARDING_API_KEYS or the file that
ONBOARDING_API_KEYS_FILE names; it holds the SHA-256 of the key, from which the key cannot be found.

A name may have several keys: to change one, add a second, let the machine send it, and take the
first out.

Scopes: sessions makes and edits sessions; generator reads exports, reports, stores results, and
keeps tasks; admin sees and changes everything at once.
"""

import argparse
import secrets
import sys

from app.onboarding.access import Scope, is_api_key_name, write_api_key

PREFIX = "ok_"
"""What every key begins with, so that those who look for leaked ones find it."""

RANDOM_BYTES = 32
"""How much of a key is random: nobody guesses 256 bits."""


def name(text: str) -> str:
    """Read a name of the command line."""
    if not is_api_key_name(text):
        raise argparse.ArgumentTypeError("a name has 1 to 64 of A-Z a-z 0-9 . _ -")
    return text


def scope(text: str) -> Scope:
    """Read a scope of the command line."""
    try:
        return Scope(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"the scopes are {', '.join(Scope)}") from None


def main() -> int:
    """Make a key, print it, and return the exit status; 2 for what cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m app.keys", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", metavar="NAME", type=name, help="who sends the key")
    parser.add_argument("scopes", metavar="SCOPE", nargs="+", type=scope, help="what it may do")
    asked = parser.parse_args()
    key = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
    print(key)  # noqa: T201
    print(write_api_key(asked.name, dict.fromkeys(asked.scopes), key))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
