"""Answers as they are generated: over HTTP, and in the terminal."""
