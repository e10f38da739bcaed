"""What people read: comparisons, tables, plots, HTML, the bench."""
