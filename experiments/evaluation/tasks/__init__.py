"""Task files of the evaluation harness over local JSON lines."""
