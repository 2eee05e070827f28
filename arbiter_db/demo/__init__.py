"""The demo: a trading app on its own server, arbiter installed on it, the whole story played."""

from .story import DEFAULT_ROWS, run

__all__ = ["DEFAULT_ROWS", "run"]
