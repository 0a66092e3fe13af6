"""What a trained program is good for: anomalies, classification, representations."""
