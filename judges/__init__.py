"""Who says which answer is better, and what follows from it. Imports core and its own room."""
