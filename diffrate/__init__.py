"""DiffRate: compress the tokens of pretrained Vision Transformers (arXiv 2305.17997).

What there is, and where, stands in `__init__.pyi`. Each name is imported when it is first used, so that
what needs no torch (schedules, budgets, settings) is there at once.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.9.0"
ROUNDS = 10  # timed pairs of a benchmark
