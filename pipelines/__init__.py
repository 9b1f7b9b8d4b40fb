"""What people run: one module a command, `python -m pipelines.<command> --help`."""
