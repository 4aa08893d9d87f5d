"""What every stage stands on. Imports nothing but its own room."""
