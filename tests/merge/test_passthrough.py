from collections.abc import Callable
from typing import Any

import numpy as np

Apply = Callable[..., Any]


def test_copy_is_exact_down_to_the_sign_of_zero(apply: Apply) -> None:
    x = np.array([1.5, -0.0, 1e-44, 3e38], np.float32)
    assert apply("passthrough", [x], scale=(1.0,)).tobytes() == x.tobytes()


def test_scale(apply: Apply) -> None:
    assert apply("passthrough", [[1.0, -2.0]], scale=(0.5,)).tolist() == [0.5, -1.0]
