"""The mechanism: `explanation_mode`, `freeze`, and the table of rules for operations that are not ours."""

from bcoskit.dynamic._formulas import GATES, attention, gate, normalize
from bcoskit.dynamic._mode import (
    PRODUCT_POLICIES,
    ExplanationMode,
    NotLinearError,
    ProductPolicy,
    current_mode,
    explanation_mode,
    freeze,
    frozen,
    is_frozen,
)
from bcoskit.dynamic.rules import rule

__all__ = [
    "GATES",
    "PRODUCT_POLICIES",
    "ExplanationMode",
    "NotLinearError",
    "ProductPolicy",
    "attention",
    "current_mode",
    "explanation_mode",
    "freeze",
    "frozen",
    "gate",
    "is_frozen",
    "normalize",
    "rule",
]
