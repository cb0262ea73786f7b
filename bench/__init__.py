"""Benches of evbus: `python -m bench throughput`. What the figures mean stands in bench/README.md."""
