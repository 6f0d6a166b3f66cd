"""Numbers that people wrote as text: decimal sign, groups of digits, currency."""

from __future__ import annotations

import re

import polars as pl

from flm_torchrec.prepare.options import NumberForm

BLANKS = "[ \u00a0\u2009\u202f]"
"""What separates thousands where a space is named: plain, no-break, thin, narrow no-break."""


def read_numbers(column: pl.Series, form: NumberForm) -> pl.Series:
    """[n] text → [n] float64; null where the text is no number in that form. A column of numbers stays as it is."""
    if column.dtype != pl.String:
        return column
    return column.to_frame().select(number_expression(pl.col(column.name), form)).to_series()


def number_expression(text: pl.Expr, form: NumberForm) -> pl.Expr:
    """As `read_numbers`, for an expression of text."""
    text = text.str.strip_chars()
    if form == NumberForm():
        return text.cast(pl.Float64, strict=False)
    if form.currency:
        sign = re.escape(form.currency)
        text = text.str.replace(rf"^([+-]?)\s*{sign}\s*", "$1").str.replace(rf"\s*{sign}$", "")
    number = pl.when(text.str.contains(_pattern(form))).then(text)
    ungrouped = number.str.replace_all(_group_sign(form), "") if form.thousands else number
    return ungrouped.str.replace(form.decimal, ".", literal=True).cast(pl.Float64, strict=False)


def _group_sign(form: NumberForm) -> str:
    return BLANKS if form.thousands == " " else re.escape(form.thousands)


def _pattern(form: NumberForm) -> str:
    """Digits; groups of them have three digits or, as in India, two, and the last one three."""
    point, sign = re.escape(form.decimal), _group_sign(form)
    grouped = rf"\d{{1,3}}(?:{sign}\d{{2,3}})*{sign}\d{{3}}|" if form.thousands else ""
    return rf"^[+-]?(?:(?:{grouped}\d+)(?:{point}\d*)?|{point}\d+)(?:[eE][+-]?\d+)?$"
