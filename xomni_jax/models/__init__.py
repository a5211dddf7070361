"""The networks, each with its parameter table."""
