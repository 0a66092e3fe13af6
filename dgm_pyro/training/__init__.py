"""Fitting a program: optimization, compiled steps, several processes."""
