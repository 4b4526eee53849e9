"""The demo: an anomaly detector trained on photographs, ``python -m bench.demo``."""
