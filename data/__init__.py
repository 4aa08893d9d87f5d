"""Getting data and models. Nothing here is imported by a stage."""
