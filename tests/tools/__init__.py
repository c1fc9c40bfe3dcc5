"""Tools that keep notebooks, package and pages in step. Each runs as a script and has tests."""
