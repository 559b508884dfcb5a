"""Learns the tables of a model from text: statistics of its keys and values, bases, k-means, distillation."""

from .finetune import finetune
from .noise import measure_noise
from .run import calibrate

__all__ = ["calibrate", "finetune", "measure_noise"]
