"""The ranks of distributed tests: those of the program itself, under the name by which tests know them."""

from potamos.parallel.local import RankError, RankTimeout, _Child, _raise_first_failure, run_ranks

__all__ = ["RankError", "RankTimeout", "_Child", "_raise_first_failure", "run_ranks"]
