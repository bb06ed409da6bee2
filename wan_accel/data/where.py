"""Expressions that choose clips: `quality.hand_score < 0.3 and source.path contains walk`. Torch-free."""

import difflib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from pyparsing import ParserElement

Columns = Mapping[str, pa.DataType]
_COMPARISONS = {
    "<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal, "=": pc.equal, "==": pc.equal,
    "!=": pc.not_equal,
}  # fmt: skip
HELP = (
    "comparisons (= != < <= > >= contains, `is missing`, `is not missing`) joined by and, or, not and parentheses, "
    "e.g. quality.hand_score < 0.3 and source.path contains walk"
)


def parse_where(text: str, columns: Columns, *, option: str = "--where") -> pc.Expression:
    """Turn an expression into one of pyarrow over these columns; nothing of it is run as code.

    `contains` looks for a piece of a text, whatever the case of its letters. A missing value answers no comparison,
    so a clip without hands is neither `quality.hand_score < 0.3` nor `>= 0.3`. `option` is where the text was given,
    for errors.

    Raises:
        ValueError: the text is no expression, names an unknown column, or compares it with a value of another kind.
    """
    from pyparsing import ParseBaseException

    try:
        (expression,) = _grammar(columns).parse_string(text, parse_all=True)
    except ParseBaseException as error:
        rest = text[error.loc :].strip()
        where = f"stops making sense at {rest!r}" if rest else "ends too early"
        raise ValueError(f"{option} {text!r} {where}: write {HELP}") from None
    except RecursionError:
        raise ValueError(f"{option}: too many parentheses in {text[:60]!r}…") from None
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
    return expression


def _grammar(columns: Columns) -> "ParserElement":
    from pyparsing import CaselessKeyword, Forward, QuotedString, Regex, Suppress, ZeroOrMore, one_of

    word = CaselessKeyword
    reserved = word("and") | word("or") | word("not") | word("is") | word("contains")
    column = ~reserved + Regex(r"[A-Za-z_][\w.]*")
    value = QuotedString('"', esc_char="\\") | QuotedString("'", esc_char="\\") | Regex(r"[^\s()<>=!'\"]+")
    compared = column + (one_of(list(_COMPARISONS)) | word("contains")) + value
    missing = column + word("is") + word("missing")
    present = column + word("is") + word("not") + word("missing")
    compared.set_parse_action(lambda found: _compare(found[0], found[1], found[2], columns))
    missing.set_parse_action(lambda found: _field(found[0], columns).is_null())
    present.set_parse_action(lambda found: _field(found[0], columns).is_valid())
    either = Forward()
    single = Forward()
    single <<= (
        (Suppress(word("not")) + single).set_parse_action(lambda found: ~found[0])
        | Suppress("(") + either + Suppress(")")
        | present
        | missing
        | compared
    )
    both = single + ZeroOrMore(Suppress(word("and")) + single)
    both.set_parse_action(lambda found: _joined(list(found), pc.and_kleene))
    either <<= (both + ZeroOrMore(Suppress(word("or")) + both)).set_parse_action(
        lambda found: _joined(list(found), pc.or_kleene)
    )
    return either


def _joined(expressions: list[pc.Expression], join: Any) -> pc.Expression:
    result = expressions[0]
    for expression in expressions[1:]:
        result = join(result, expression)
    return result


def _compare(name: str, operator: str, value: str, columns: Columns) -> pc.Expression:
    field, kind = _field(name, columns), columns[name]
    if operator == "contains":
        if not pa.types.is_string(kind):
            raise ValueError(f"{name} is a number, it cannot contain {value!r}: compare it with < or >")
        return pc.match_substring(field, value, ignore_case=True)
    if pa.types.is_string(kind):
        return _COMPARISONS[operator](field, pa.scalar(value))
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} is a number, {value!r} is none")
    # As exact as the column: 0.1 of a float32 column is not 0.1 of a float64.
    exact = pa.scalar(number, kind) if pa.types.is_floating(kind) else pa.scalar(number)
    return _COMPARISONS[operator](field, exact)


def _field(name: str, columns: Columns) -> pc.Expression:
    if name not in columns:
        near = difflib.get_close_matches(name, columns, n=1, cutoff=0.4)
        guess = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"a clip has no {name}: {guess}There are {', '.join(columns)}")
    return pc.field(name)
