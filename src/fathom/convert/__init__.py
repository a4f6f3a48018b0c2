"""Checkpoints in and out: our own run folders, and other families' formats as rules."""
