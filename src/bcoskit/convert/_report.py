"""What a conversion has done, module by module."""

from collections import Counter
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bcoskit.convert._config import BcosConfig


@dataclass(frozen=True)
class ConvertedModule:
    """What became of one module.

    Attributes:
        path: Where it is.
        kind: Its class, as it was.
        outcome: `"replaced"`, `"changed"` (a part of it), `"kept"` (known to need nothing), `"skipped"` (by request),
            `"bypassed"` (the network uses its weight without or beside its calls, and stays linear there), or `"left"`
            (holds weights and no rule knows it).
        detail: What it is now, or why.
    """

    path: str
    kind: str
    outcome: str
    detail: str


@dataclass(frozen=True)
class ConversionReport:
    """What became of the modules of a network; printed, it is a table.

    Attributes:
        config: What was to be made of the network.
        modules: One row per module.
        skip: The patterns of what was to stay as it is.
        has_own_rules: Whether rules were given that are not those of the package.
    """

    config: BcosConfig
    modules: tuple[ConvertedModule, ...]
    skip: tuple[str, ...] = ()
    has_own_rules: bool = False

    def of(self, outcome: str) -> tuple[ConvertedModule, ...]:
        """The modules with one outcome."""
        return tuple(module for module in self.modules if module.outcome == outcome)

    def __str__(self) -> str:
        counts = Counter((module.outcome, module.kind, module.detail) for module in self.modules)
        examples = {(module.outcome, module.kind, module.detail): module.path for module in reversed(self.modules)}
        table = Table("outcome", "module", "now", "times", "first")
        for key, count in sorted(counts.items()):
            outcome, kind, detail = key
            table.add_row(outcome, kind, detail, str(count), examples[key])
        console = Console(width=150, color_system=None)
        with console.capture() as capture:
            console.print(table, markup=False)
        return capture.get().rstrip()
