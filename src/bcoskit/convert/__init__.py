"""The conversion of ordinary networks to B-cos networks."""

from bcoskit.convert._bcosify import bcosify
from bcoskit.convert._config import BcosConfig
from bcoskit.convert._report import ConversionReport, ConvertedModule
from bcoskit.convert._rules import Rule
from bcoskit.convert._schedule import GradualConversion, set_b

__all__ = ["BcosConfig", "ConversionReport", "ConvertedModule", "GradualConversion", "Rule", "bcosify", "set_b"]
