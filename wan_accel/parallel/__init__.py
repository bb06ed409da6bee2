"""Sharding, sequence parallelism and what the CPU needs for both."""
