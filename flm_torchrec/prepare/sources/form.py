"""How the text files of a source are written: separators, encoding, numbers."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

import polars as pl

from flm_torchrec.errors import DataError

BLANKS = "[ \u00a0\u2009\u202f]"
"""What separates thousands where a space is named: plain, no-break, thin, narrow no-break."""


@dataclass(frozen=True)
class Numbers:
    """How numbers are written in text."""

    decimal: str = "."
    thousands: str = ""
    """Between groups of digits; empty: nothing."""
    currency: str = ""
    """Sign or code before or after a number, taken off; empty: none."""

    def check(self) -> None:
        """Raise DataError where the signs cannot be told apart."""
        for option, sign in (("--decimal", self.decimal), ("--thousands", self.thousands)):
            if sign and (len(sign) > 1 or sign.isalnum() or sign in '+-"'):
                raise DataError(f"{option} '{sign}': give one sign, such as , or .")
        if not self.decimal or self.decimal == self.thousands:
            raise DataError(f"--thousands '{self.thousands}': must differ from --decimal '{self.decimal}'")
        if re.search(r"[\d+\-.,\s]", self.currency):
            raise DataError(f"--currency '{self.currency}': give one sign or code, such as € or EUR")

    def read(self, column: pl.Series) -> pl.Series:
        """[n] text → [n] float64; null where it is no number written so. Numbers stay as they are."""
        if column.dtype != pl.String:
            return column
        return column.to_frame().select(self.expression(pl.col(column.name))).to_series()

    def expression(self, text: pl.Expr) -> pl.Expr:
        """As `read`, of text alone."""
        text = text.str.strip_chars()
        if self == Numbers():
            return text.cast(pl.Float64, strict=False)
        if self.currency:
            sign = re.escape(self.currency)
            text = text.str.replace(rf"^([+-]?)\s*{sign}\s*", "$1").str.replace(rf"\s*{sign}$", "")
        plain = pl.when(text.str.contains(self._pattern())).then(text)
        between = plain.str.replace_all(self._between(), "") if self.thousands else plain
        return between.str.replace(self.decimal, ".", literal=True).cast(pl.Float64, strict=False)

    def _between(self) -> str:
        return BLANKS if self.thousands == " " else re.escape(self.thousands)

    def _pattern(self) -> str:
        """Digits, in groups of three or, as in India, two and at last three, if in groups at all."""
        point = re.escape(self.decimal)
        grouped = rf"\d{{1,3}}(?:{self._between()}\d{{2,3}})*{self._between()}\d{{3}}|" if self.thousands else ""
        return rf"^[+-]?(?:(?:{grouped}\d+)(?:{point}\d*)?|{point}\d+)(?:[eE][+-]?\d+)?$"


@dataclass(frozen=True)
class Form:
    """How text files are written; all files of one preparation are written alike."""

    separator: str = ","
    list_separator: str = "|"
    encoding: str = "utf-8"
    multiline: bool = False
    """A quoted field of a CSV file of events may go on in the next line."""
    numbers: Numbers = Numbers()

    def check(self) -> None:
        """Raise DataError where a setting is unknown or two contradict each other."""
        try:
            known = codecs.lookup(self.encoding)._is_text_encoding  # type: ignore[attr-defined]
        except (LookupError, ValueError):
            known = False
        if not known:
            raise DataError(f"--encoding '{self.encoding}': not known; give one such as utf-8, latin-1, cp1252, utf-16")
        if not self.list_separator:
            raise DataError("--list-separator '': give a sign that separates the values of a list")
        if self.list_separator in (self.numbers.decimal, self.numbers.thousands) and self.list_separator != ".":
            raise DataError(f"--list-separator '{self.list_separator}': must differ from --decimal and --thousands")
        self.numbers.check()
