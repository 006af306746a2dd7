"""unmask: reinforcement-learning post-training of diffusion language models."""

__version__ = "0.1.0"
