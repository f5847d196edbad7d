"""The command line, packaged configs, benchmarks and committed results."""
