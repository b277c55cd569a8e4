"""Numbers as people read them."""

import math
from collections.abc import Sequence

_SUFFIXES = {3: "k", 6: "M", 9: "G", 12: "T"}


def number(value: float | None) -> str:
    """Write a number with four significant digits, as short as it can be read; `-` for None."""
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(value)
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if size >= 1e4 else f"{value:.4g}"


def compact(value: float) -> str:
    """Write a number with at most seven characters, for columns: three significant digits."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size >= 99_999.5 or 0 < size < 0.00995:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if size >= 999.5 else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Write seconds as h:mm:ss; `-:--:--` for None."""
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def rounded(value: float | None, error: float | None) -> str:
    """Write a number to the second digit of its standard error: 0.54217 with 0.0088 is 0.5422."""
    if value is None or not error or not math.isfinite(error):
        return number(value)
    decimals = 1 - math.floor(math.log10(error))
    return f"{value:.{decimals}f}" if 0 < decimals <= 6 else number(value)


def axis_labels(values: Sequence[float]) -> list[str]:
    """Write the marks of one axis with one power of ten: 0, 0.5e-4, 1e-4 or 0, 5k, 10k."""
    largest = max(map(abs, values), default=0.0)
    power = math.floor(math.log10(largest)) if largest else 0
    if -3 <= power < 4:
        power = 0
    elif 4 <= power < 15:
        power -= power % 3
    suffix = _SUFFIXES.get(power, f"e{power}") if power else ""
    return [f"{value / 10.0**power:.10g}{suffix}" if value else "0" for value in values]
