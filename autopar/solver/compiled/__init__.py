"""Kernels compiled by Numba, for problems that presolve leaves large. Imported only where they are used."""
