"""What goes into a model and comes out of it: images, text, ids."""
