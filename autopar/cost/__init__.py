"""What a plan costs: seconds of computation and communication on given hardware."""

from autopar.cost.alpa import AlpaCost
from autopar.cost.compute import equation_flops, equation_transcendentals, flops_of, fusible
from autopar.cost.model import COLLECTIVES, CostModel, RooflineCost, Work, on_chip_bytes, overlaps, rounds_products
from autopar.cost.profiles import PROFILES, hardware, read_profile, write_profile

__all__ = [
    "COLLECTIVES",
    "PROFILES",
    "AlpaCost",
    "CostModel",
    "RooflineCost",
    "Work",
    "equation_flops",
    "equation_transcendentals",
    "flops_of",
    "fusible",
    "hardware",
    "on_chip_bytes",
    "overlaps",
    "read_profile",
    "rounds_products",
    "write_profile",
]
