"""Numbers for a record: it reads well, and does not change with the last bit."""

__all__ = ["rounded"]


def rounded(value: float, digits: int = 5) -> float:
    """`value` to so many significant digits."""
    return float(f"{value:.{digits}g}")
