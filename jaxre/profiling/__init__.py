"""Reports of this machine and profiles of runs."""
