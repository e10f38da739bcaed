"""What every floor may use: files that appear whole or not at all, progress, terminal output, passes over a model."""
