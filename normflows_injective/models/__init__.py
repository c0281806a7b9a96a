"""Models, their training terms and their losses."""
