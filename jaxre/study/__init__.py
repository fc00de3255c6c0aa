"""Studies: grids of runs, planned, run resumably, and left as one record."""
