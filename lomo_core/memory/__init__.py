"""Memory by category: measured while a run goes on (`meter.py`)."""
