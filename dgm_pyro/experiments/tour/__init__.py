"""The tour: every family trained on real digits, and a report of what each is good for."""
