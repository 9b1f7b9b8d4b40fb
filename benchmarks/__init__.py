"""Long experiments whose figures stand in RESULTS.md; each file is a command."""
