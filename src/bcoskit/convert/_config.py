"""What a conversion makes of a network."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, cast


@dataclass(frozen=True)
class BcosConfig:
    """What `bcosify` makes of a network, as plain values.

    By default that of Arya et al., NeurIPS 2024, but for max pools, which stay, and the logit bias: with `b=1` and
    `biases="keep"` alone, the network computes what the original computes.

    Attributes:
        b: Exponent of the B-cos transform, at least 1; with 1 a layer stays linear.
        learnable_b: Whether every layer gets an exponent of its own that is trained, starting at `b`. `bcoskit train`
            keeps it at least 1; a loop of one's own has to, after each step.
        max_out: Filters that compete for each output; each starts as a copy of the ordinary one. Transposed
            convolutions have one.
        normalize_weight: Whether filters are divided by their norm; with pretrained weights that changes the network.
        biases: Whether biases of layers and norms are kept.
        norms: `"uncentered"` for batch norms that only divide, `"keep"` for norms as they are.
        activations: `"keep"`, or `"drop"` for identities in the place of ReLU and GELU, where these are modules.
        max_pool: `"keep"`, or `"average"` for average pools in the place of max pools, where these are modules.
        projections: `"linear"` for queries, keys and values that stay ordinary layers, or `"bcos"`, but for those of
            `nn.MultiheadAttention`, which are one matrix.
        encode: Whether the converted network takes `[x, 1 - x]`, twice the channels, where the original took `x`.
        mean: Mean of the image per channel, which the network itself subtracts then; None for what the network's own
            configuration (of timm) says, or else 0.
        std: Standard deviation that goes with `mean`; None likewise, or else 1.
        classifier: `"before pooling"` to classify positions and then average, where the network can be told so, or
            `"keep"`.
        logit_bias: Constant of the logits; `"uniform"` for `-log(classes - 1)` if they come from a linear layer, None
            for none.
        temperature: Divisor of the logits; None for 1.

    Raises:
        ValueError: If a value is out of its range.
    """

    b: float = 2.0
    learnable_b: bool = False
    max_out: int = 1
    normalize_weight: bool = False
    biases: Literal["keep", "drop"] = "drop"
    norms: Literal["keep", "uncentered"] = "uncentered"
    activations: Literal["keep", "drop"] = "keep"
    max_pool: Literal["keep", "average"] = "keep"
    projections: Literal["linear", "bcos"] = "linear"
    encode: bool = True
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classifier: Literal["keep", "before pooling"] = "before pooling"
    logit_bias: float | Literal["uniform"] | None = None
    temperature: float | None = None

    _CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "biases": ("keep", "drop"),
        "norms": ("keep", "uncentered"),
        "activations": ("keep", "drop"),
        "max_pool": ("keep", "average"),
        "projections": ("linear", "bcos"),
        "classifier": ("keep", "before pooling"),
    }

    def __post_init__(self) -> None:
        if not _is_number(self.b) or not 1 <= self.b < math.inf:
            raise ValueError(f"`b` (={self.b!r}) must be a finite exponent of at least 1, as a number of Python")
        if type(self.max_out) is not int or self.max_out < 1:
            raise ValueError(f"`max_out` (={self.max_out}) must be an integer of at least 1")
        for name in ("learnable_b", "normalize_weight", "encode"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"`{name}` (={getattr(self, name)!r}) must be True or False")
        for name, choices in self._CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` (={getattr(self, name)!r}) must be one of {', '.join(choices)}")
        if self.logit_bias not in (None, "uniform") and not _is_number(self.logit_bias):
            raise ValueError(f"`logit_bias` (={self.logit_bias!r}) must be a finite number, 'uniform' or None")
        if self.temperature is not None and not (_is_number(self.temperature) and self.temperature > 0):
            raise ValueError(f"`temperature` (={self.temperature}) must be a finite divisor above 0, or None")
        for name in ("mean", "std"):
            if not isinstance(getattr(self, name), (tuple, list, type(None))):
                raise ValueError(f"`{name}` (={getattr(self, name)}) must be a tuple of numbers")  # noqa: TRY004
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise ValueError(f"`mean` (={self.mean}) and `std` (={self.std}) must have as many values")
        if self.mean is not None and not all(map(_is_number, self.mean)):
            raise ValueError(f"`mean` (={self.mean}) must hold finite numbers")
        if self.std is not None and not all(_is_number(value) and value > 0 for value in self.std):
            raise ValueError(f"`std` (={self.std}) must be finite and above 0")
        if not self.encode and self.mean is not None:
            raise ValueError("`mean` and `std` need `encode` (=False): without it the input is taken as it comes")

    @property
    def has_constants(self) -> bool:
        """Whether there are constants of the logits, a bias or a temperature."""
        return self.logit_bias is not None or self.temperature is not None

    @classmethod
    def preset(cls, name: str) -> "BcosConfig":
        """A configuration by name.

        Args:
            name: `"bcosification"` (Arya et al., NeurIPS 2024); `"v2"` (Böhle et al., TPAMI 2024) and
                `"v1"` (Böhle et al., CVPR 2022), whose filters have unit norm and which have no activations: of
                the network only its shape is kept; `"exact"`, which computes what the original computes, to begin a
                gradual conversion.

        Raises:
            ValueError: If there is none of that name.
        """
        presets = {
            "bcosification": cls(max_pool="average", logit_bias="uniform"),
            "v2": cls(normalize_weight=True, activations="drop", max_pool="average", logit_bias="uniform"),
            "v1": cls(normalize_weight=True, activations="drop", max_pool="average", max_out=2, logit_bias="uniform"),
            "exact": cls(b=1.0, biases="keep", norms="keep", classifier="keep"),
        }
        if name not in presets:
            raise ValueError(f"`name` (={name!r}) must be one of {', '.join(presets)}")
        return presets[name]


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(cast("float", value))
