"""The families of programs, and what they are composed of."""
