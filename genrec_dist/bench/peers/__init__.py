"""What the benchmarks are measured beside."""
