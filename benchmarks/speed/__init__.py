"""What each part costs, against the ways that others take: ``python -m benchmarks.speed PART``."""
