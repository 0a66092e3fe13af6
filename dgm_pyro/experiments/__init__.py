"""Training runs on disk, sweeps, pictures, reports, and the tour of all families."""
