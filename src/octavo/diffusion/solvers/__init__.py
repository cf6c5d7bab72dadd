"""Solvers that diffusers lacks, or has in a form that not every pipeline can drive."""
