"""The texture demo: ``python -m bench.demo``."""
