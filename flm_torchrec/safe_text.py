r"""Makes text safe to print, log and store: control characters become visible, secrets are removed."""

from __future__ import annotations

import html
import re
import unicodedata
from functools import lru_cache
from urllib.parse import quote, quote_plus, unquote, unquote_plus

JOINERS = "\u200c\u200d"
"""Zero-width joiners stay: Persian, Hindi and emoji need them, and they do nothing else on a terminal."""
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories: control, format (with right-to-left overrides), surrogates, line and paragraph separators."""
SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}

MASK = "***"
SECRET = (
    r"(?:password|passwd|passphrase|secret|token|credentials?|signature|authorization|(?<![a-z])(?:pwd|pass|sig|auth)"
    r"|(?:api|(?:access|account|client|private|secret|server|shared)(?:[-_.]?access)?)[-_.]?key)"
)
NAME = rf"[\w.-]*{SECRET}"
"""Name of a parameter whose value is a secret, such as sslpassword, X-Amz-Signature or aws_secret_access_key."""
QUOTED = r"'(?:[^'\\]|\\.)*'?|\"(?:[^\"\\]|\\.)*\"?"
ASSIGNED = re.compile(rf"(?i)(\b{NAME}[\"']?\s*=\s*)((?:{QUOTED}|[^\s&;,'\"])+)")
HEADER = re.compile(r"(?i)(\b(?:authorization|api-key|x-api-key)[\"']?\s*:\s*)(?:(?:bearer|basic)\s+)?[^\s,;]+")
MEMBER = re.compile(rf"(?i)([\"']{NAME}[\"']\s*:\s*)({QUOTED})")
USER = re.compile(r"((?:\S*::[\w+.-]*)?://)\S*@")
"""User and password of an address, up to its last @: a password may contain an @."""

CHAIN = re.compile(r"::(?=[\w+.-]*://)")
"""Separator of the addresses of a chain, in the syntax of fsspec."""
LIBPQ = re.compile(rf"(?is)\b{NAME}\s*=\s*((?:{QUOTED})(?=\s|$)|.*?(?=\s+\w+\s*=|$))")
"""A secret of PostgreSQL's "host=… password=…", up to the next name; blanks are included although they need quotes."""
DELIMITERS = re.compile(r"[\s@/:?#&=%;,+'\"\\\[\]]+")
"""Where a client may split a password that is not percent-encoded, and print a piece of it, for example as a host."""
SHORTEST = 4
"""Minimum length of a secret that is also replaced inside words."""
PIECE = 3
"""Minimum length of a piece of a secret that is removed on its own."""


def visible(text: str) -> str:
    r"""The text on one line, with each control or format character as its escape, such as `\x1b`, `\n` or `\u202e`."""
    return text if text.isascii() and text.isprintable() else "".join(map(_visible, text))


def escape(text: str) -> str:
    """The text for HTML, on one line and visible: a name can neither be markup nor change the text after it."""
    return html.escape(visible(text))


def redact(text: str, *addresses: str) -> str:
    """The text without passwords, keys and tokens.

    Removed are strings in the form of a secret (`//user:password@`, `password=…`, `api_key=…`, an Authorization
    header), and the secrets of the addresses in any encoding, since a client's message may repeat these. Use
    `redact_address` for a text that is itself an address.
    """
    secrets = sorted({s for a in addresses for s in _secrets(a)}, key=lambda s: (-len(s), s))
    if secrets:
        either = "|".join(re.escape(s) if len(s) >= SHORTEST else rf"(?<!\w){re.escape(s)}(?!\w)" for s in secrets)
        text = re.sub(either, MASK, text, flags=re.IGNORECASE)
    text = USER.sub(rf"\1{MASK}@", text)
    for pattern in (ASSIGNED, MEMBER, HEADER):
        text = pattern.sub(rf"\1{MASK}", text)
    return text


def redact_address(address: str) -> str:
    """The address without secrets: `postgresql://***@host/x?password=***`."""
    return redact(address, address)


def first_line(error: BaseException | str, *addresses: str) -> str:
    """The first line of an error or of its text, at most 200 characters, without the secrets of the addresses."""
    lines = redact(str(error), *addresses).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@lru_cache(maxsize=4096)
def _visible(character: str) -> str:
    if character in JOINERS or unicodedata.category(character) not in HIDDEN:
        return character
    if character in SHORT:
        return SHORT[character]
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _secrets(address: str) -> set[str]:
    """All spellings and pieces of the secrets in an address, or in a chain of addresses."""
    secrets: set[str] = set()
    for link in CHAIN.split(address):
        for secret in (*_of_user(link), *_of_query(link), *(m[1].strip() for m in LIBPQ.finditer(link))):
            secrets |= _spellings(secret)
    return secrets - {"", MASK}


def _of_user(address: str) -> list[str]:
    """The password between `//` and the last `@`, or everything there if it has no colon."""
    _, slashes, rest = address.partition("://")
    if not slashes:
        _, _, rest = address.partition(":")  # KIND:user:password@host, the scheme forgotten
    before, at, _ = rest.rpartition("@")
    user, colon, password = before.partition(":")
    if not at or (not slashes and not colon):
        return []
    # A user without a password may be a token. PostgreSQL has no tokens, and its messages name the user.
    return [password] if colon else [] if address.startswith("postgres") else [user]


def _of_query(address: str) -> list[str]:
    """Values of parameters with a secret's name. A piece without a name belongs to the value before it."""
    values: list[str] = []
    secret = False
    for piece in address.partition("?")[2].split("&"):
        name, equals, value = piece.partition("=")
        if equals:
            secret = re.fullmatch(rf"(?i){NAME}", unquote(name).strip()) is not None
        if secret:
            values.append(value if equals else piece)
    return values


def _spellings(secret: str) -> set[str]:
    """A secret as given, decoded, encoded and unquoted, and its pieces between delimiters."""
    unescaped = re.sub(r"\\(.)", r"\1", secret.removeprefix("'").removesuffix("'"))
    plain = {secret, unescaped, unquote(secret), unquote_plus(secret), unquote(unquote(secret))}
    pieces = {piece for one in plain for piece in DELIMITERS.split(one) if len(piece) >= PIECE}
    encoded = {how(one, safe="") for one in plain for how in (quote, quote_plus)}
    escaped = {repr(one)[1:-1] for one in plain} | {visible(one) for one in plain}
    return plain | pieces | encoded | escaped
