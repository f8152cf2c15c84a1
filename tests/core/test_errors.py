"""The tree of errors, its exit codes, and the picture of it in the module."""

import solera_core
from solera_core import errors


def test_the_drawing_is_the_tree() -> None:
    assert errors.__doc__ is not None
    for name in errors.__all__:
        kind = getattr(errors, name)
        line = next(line for line in errors.__doc__.splitlines() if f" {name} " in f" {line.strip('│├└─ ')} ")
        digits = [word for word in line.split() if word.isdigit()]
        parent = next(k for k in kind.__mro__[1:] if k.__name__ in errors.__all__ or k is Exception)
        assert not digits or int(digits[-1]) == kind.exit_code or "exit code" in line
        indent = len(line) - len(line.lstrip(" │├└─"))
        if parent is not Exception:
            above = next(text for text in errors.__doc__.splitlines() if parent.__name__ in text)
            assert indent == len(above) - len(above.lstrip(" │├└─")) + 4


def test_exit_codes() -> None:
    codes = {name: getattr(errors, name).exit_code for name in errors.__all__}
    assert {name for name, code in codes.items() if code == 4} == {"ResourceError", "DiskFullError", "HubError"}
    assert set(codes.values()) == {3, 4}


def test_the_public_names_of_the_package() -> None:
    assert set(errors.__all__) | {"Context", "Plan"} == set(solera_core.__all__)
    assert all(hasattr(solera_core, name) for name in solera_core.__all__)
