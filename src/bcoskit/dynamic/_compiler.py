"""Imported where a compiler traces an `explanation_mode`: shows it the operations that torch does not.

To a function mode the compiler hands what torch lists as overridable. Some that are not on that list reach a mode all
the same when nothing is compiled (`F.hardswish`), or consist of others that do (`F.sigmoid`), while the compiler takes
them as they are: their factors would silently not be frozen.
"""

from torch._dynamo.variables.torch import get_overridable_functions

from bcoskit.dynamic._mode import OPERATIONS

get_overridable_functions().update(OPERATIONS)
