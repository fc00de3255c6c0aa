"""Evaluation: predictions, baselines and comparisons here; scores and significance in `metrics`;
frontier models' cached answers in `frontier`; tables, figures and the HTML page in `report`.
"""
