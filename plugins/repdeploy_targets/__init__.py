"""Target formats that come as plugins: each module registers its exporter, its runtime or both in `pyproject.toml`."""
