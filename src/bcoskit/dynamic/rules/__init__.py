"""The table of rules: what the operations of networks that are not ours become inside `explanation_mode`.

Five kinds cover them. *Natural* operations are linear or piecewise linear and need no entry. A *gate* has
`f(0) = 0` and is written `x · g(x)` with `g(x) = f(x)/x` frozen. A *constant* (softmax, sigmoid, exp …) is
frozen altogether. A *normaliser* keeps its centring linear and freezes its statistic. A *product* of two
input-dependent tensors follows the mode's policy.
"""

import importlib

from bcoskit.dynamic._mode import RULES
from bcoskit.dynamic.rules._table import rule

# Each of these enters its rules in the table.
for _module in ("_gates", "_constants", "_products", "_norms", "_attention", "_composites"):
    importlib.import_module(f"bcoskit.dynamic.rules.{_module}")

_BUILT_IN = dict(RULES)


def are_built_in() -> bool:
    """Whether nobody has added to the table of rules, or changed it."""
    return RULES == _BUILT_IN


__all__ = ["are_built_in", "rule"]
