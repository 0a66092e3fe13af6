"""Uses of a trained program: anomalies, classification, representations."""
