"""Fuzzing of every reader: `sound` makes small valid inputs, `mutations` spoils them, `readers` reads all of it."""
