r"""Text for people, made safe to print, log and keep: control characters become visible, secrets are taken out."""

from __future__ import annotations

import html
import re
import unicodedata
from functools import lru_cache
from urllib.parse import quote, quote_plus, unquote, unquote_plus

JOINERS = "\u200c\u200d"
"""Zero-width joiners: Persian, Hindi and emoji are written with these, and these move nothing on a terminal."""
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories: control, format (also right-to-left overrides), half characters, line and paragraph ends."""
SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}

MASK = "***"
SECRET = (
    r"(?:password|passwd|passphrase|secret|token|credentials?|signature|authorization|(?<![a-z])(?:pwd|pass|sig|auth)"
    r"|(?:api|(?:access|account|client|private|secret|server|shared)(?:[-_.]?access)?)[-_.]?key)"
)
NAME = rf"[\w.-]*{SECRET}"
"""Of a parameter whose value is a secret: sslpassword, X-Amz-Signature, oauth_client_secret, aws_secret_access_key."""
QUOTED = r"'(?:[^'\\]|\\.)*'?|\"(?:[^\"\\]|\\.)*\"?"
ASSIGNED = re.compile(rf"(?i)(\b{NAME}[\"']?\s*=\s*)({QUOTED}|[^\s&;,'\"]+)")
HEADER = re.compile(r"(?i)(\b(?:authorization|api-key|x-api-key)[\"']?\s*:\s*)(?:(?:bearer|basic)\s+)?[^\s,;]+")
MEMBER = re.compile(rf"(?i)([\"']{NAME}[\"']\s*:\s*)({QUOTED})")
USER = re.compile(r"((?:\S*::[\w+.-]*)?://)\S*@")
"""User and password of an address, up to its last @ so that none of a password that holds one is left."""

CHAIN = re.compile(r"::(?=[\w+.-]*://)")
"""Between the addresses of a chain, as fsspec writes it."""
LIBPQ = re.compile(rf"(?is)\b{NAME}\s*=\s*({QUOTED}|.*?(?=\s+\w+\s*=|$))")
"""Of PostgreSQL's "host=… password=…": a value up to the next name, though unquoted blanks should not be in it."""
DELIMITERS = re.compile(r"[\s@/:?#&=%;,+'\"\\\[\]]+")
"""Where a client may cut a password that is not percent-encoded, and show a piece of it, say as a host."""
SHORTEST = 4
"""Characters from which a secret is replaced inside words too."""
PIECE = 3
"""Characters of the shortest piece of a secret that is taken out by itself."""


def visible(text: str) -> str:
    r"""The text with each control or format character written as its escape, such as `\x1b`, `\n` or `\u202e`.

    Line breaks are written so too: the result is one line.
    """
    return text if text.isascii() and text.isprintable() else "".join(map(_visible, text))


def escape(text: str) -> str:
    """The text for HTML, one line and visible, so that a name can neither be markup nor turn what follows it."""
    return html.escape(visible(text))


def redact(text: str, *addresses: str) -> str:
    """The text without passwords, keys and tokens.

    Taken out are what looks like one (`//user:password@`, `password=…`, `api_key=…`, an Authorization header), and
    the secrets that the addresses hold, wherever and however encoded these stand: a client's own words may repeat
    them. A text that is itself an address is given twice, or to `redact_address`.
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
    """The address as it may be shown and kept: `postgresql://***@host/x?password=***`."""
    return redact(address, address)


def first_line(error: Exception, *addresses: str) -> str:
    """What an error says, without the secrets of the addresses, fit for one line of an error of ours."""
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
    found: set[str] = set()
    for link in CHAIN.split(address):
        for secret in (*_of_user(link), *_of_query(link), *(m[1].strip() for m in LIBPQ.finditer(link))):
            found |= _spellings(secret)
    return found - {"", MASK}


def _of_user(address: str) -> list[str]:
    """What stands between `//` and the last `@`: the password, or all of it where there is no user before a colon."""
    _, slashes, rest = address.partition("://")
    if not slashes:
        _, _, rest = address.partition(":")  # KIND:user:password@host, the scheme forgotten
    before, at, _ = rest.rpartition("@")
    user, colon, password = before.partition(":")
    if not at or (not slashes and not colon):
        return []
    # A user alone may be a token; PostgreSQL has none, and its messages name the user.
    return [password] if colon else [] if address.startswith("postgres") else [user]


def _of_query(address: str) -> list[str]:
    """Values of parameters with a secret's name. A piece without a name belongs to the value before."""
    found: list[str] = []
    secret = False
    for piece in address.partition("?")[2].split("&"):
        name, equals, value = piece.partition("=")
        if equals:
            secret = re.fullmatch(rf"(?i){NAME}", unquote(name).strip()) is not None
        if secret:
            found.append(value if equals else piece)
    return found


def _spellings(secret: str) -> set[str]:
    """A secret as given, decoded, encoded and unquoted, and its pieces between delimiters."""
    unescaped = re.sub(r"\\(.)", r"\1", secret.removeprefix("'").removesuffix("'"))
    plain = {secret, unescaped, unquote(secret), unquote_plus(secret), unquote(unquote(secret))}
    pieces = {piece for one in plain for piece in DELIMITERS.split(one) if len(piece) >= PIECE}
    encoded = {how(one, safe="") for one in plain for how in (quote, quote_plus)}
    escaped = {repr(one)[1:-1] for one in plain} | {visible(one) for one in plain}
    return plain | pieces | encoded | escaped
