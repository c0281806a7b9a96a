"""What is true of normflows: its contexts, calls, bases, first data, and what is refused of it."""
