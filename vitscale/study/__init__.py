"""Scaling studies: many runs from one file, and what they show beside the paper's figures.

A study trains every model of its list on every fraction of the data, for every seed and every
value that it sweeps. paper.py holds what the paper found.
"""
