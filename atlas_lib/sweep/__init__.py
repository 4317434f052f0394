"""What notebook 05 and tools.sweep need."""
