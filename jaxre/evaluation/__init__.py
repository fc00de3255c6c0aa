"""What a run is worth: predictions table, metrics, significance, cached frontier predictions,
baselines, report.
"""
