"""Results of a run or a study as tables, figures and one HTML page."""
