"""Requests to frontier models, and their cached answers."""
