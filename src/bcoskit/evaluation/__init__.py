"""Measure explanations: pointing games, perturbation curves, sanity checks, by any attribution method."""

from bcoskit.evaluation._accuracy import Accuracy, accuracy, accuracy_figures
from bcoskit.evaluation._grids import choose_grids, make_grid
from bcoskit.evaluation._method import Method
from bcoskit.evaluation._methods import METHODS, attribute
from bcoskit.evaluation._perturbation import (
    Perturbation,
    area_under,
    deletion,
    insertion,
    perturbation,
    perturbation_curve,
)
from bcoskit.evaluation._pointing import (
    EnergyPointing,
    GridPointing,
    energy_pointing_game,
    grid_pointing_game,
    grid_scores,
    region_mask,
)
from bcoskit.evaluation._quantus import quantus_explain
from bcoskit.evaluation._result import Failure, Result
from bcoskit.evaluation._run import evaluate
from bcoskit.evaluation._sanity import (
    Completeness,
    Randomization,
    Stability,
    completeness,
    randomization,
    randomized,
    spearman,
    stability,
)
from bcoskit.evaluation._write import box_plot, curve_plot, example_sheet, write_results

__all__ = [
    "METHODS",
    "Accuracy",
    "Completeness",
    "EnergyPointing",
    "Failure",
    "GridPointing",
    "Method",
    "Perturbation",
    "Randomization",
    "Result",
    "Stability",
    "accuracy",
    "accuracy_figures",
    "area_under",
    "attribute",
    "box_plot",
    "choose_grids",
    "completeness",
    "curve_plot",
    "deletion",
    "energy_pointing_game",
    "evaluate",
    "example_sheet",
    "grid_pointing_game",
    "grid_scores",
    "insertion",
    "make_grid",
    "perturbation",
    "perturbation_curve",
    "quantus_explain",
    "randomization",
    "randomized",
    "region_mask",
    "spearman",
    "stability",
    "write_results",
]
