"""Learns the tables of a model from text: statistics of its keys and values, bases, k-means."""

from .run import calibrate

__all__ = ["calibrate"]
