"""The package's version, in a module without imports: every other module may import it."""

__version__ = "0.1.0"
