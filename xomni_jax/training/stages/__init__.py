"""What differs from stage to stage."""
