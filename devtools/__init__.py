"""Real PostgreSQL servers for tests, the demo and benchmarks. Not part of the distribution."""
