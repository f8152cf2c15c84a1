"""Quantised checkpoints, read as the numbers they stand for. One format a file; `catalogue` knows them all.

A format says which stored tensors make up a weight, and how some rows of it are computed from them, in float32. It
reads what it needs for the rows that are asked for: the whole weight exists nowhere.
"""
